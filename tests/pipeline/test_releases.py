"""What one release began, a later one continues: an option that comes has a default that does what was done before.

A release of before is this one without an option: what it recorded lacks it.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from sftmix.components import NTP, AdamW, Callback, SFTMix, TrainedReference
from sftmix.components.component import Component
from sftmix.disk.files import read_json
from sftmix.options import LoraOptions
from sftmix.options.reference import ReferenceModel
from sftmix.options.training import LAYOUT
from sftmix.pipeline import inputs
from sftmix.pipeline.recipe import run
from sftmix.pipeline.releases import GROUPS, completed
from sftmix.pipeline.stages import SPLIT, STAGES
from sftmix.pipeline.validity import differences
from sftmix.words.errors import ConfigError
from tests.configs import read_config
from tests.pipeline.test_identity import config, read_back
from tests.tiny import contents

LATER = {"training": ["warmup_ratio", "weight_decay"], "data": ["roles"], "objective": ["lambda_per", "mean"]}
"""Input of the training -> options that the release of before does not have; their values here are the defaults."""


@pytest.fixture
def before(monkeypatch):
    """A context in which these options are not there yet, in what a run records."""
    spec, decide, rows = Component.spec, inputs.deciding_options, inputs.row_inputs

    def without(values: dict, names: list[str]) -> dict:
        return {name: value for name, value in values.items() if name not in names}

    def earlier_spec(self):
        found = spec(self)
        return found | {"init_args": without(found["init_args"], LATER["objective"])}

    def earlier_rows(known):
        found = rows(known)
        return found | {"data": without(found["data"], LATER["data"])}

    def enter():
        context = monkeypatch.context()
        patch = context.__enter__()
        patch.setattr(Component, "spec", earlier_spec)
        for module in ("sftmix.pipeline.stages.arms", "sftmix.pipeline.stages.reference"):
            patch.setattr(f"{module}.deciding_options", lambda *of: without(decide(*of), LATER["training"]))
        patch.setattr("sftmix.training.machine.LAYOUT", [name for name in LAYOUT if name != "flash_kernels"])
        for module in ("sftmix.pipeline.inputs", "sftmix.pipeline.stages.split", "sftmix.pipeline.stages.confidence"):
            patch.setattr(f"{module}.row_inputs", earlier_rows)
        return context

    return enter


def test_a_finished_run_of_before_is_read_back_and_adopted(before, finished, tmp_path, capsys):
    made = config(finished.tiny, tmp_path / "run", every=2)
    context = before()
    run(made)
    context.__exit__(None, None, None)
    recorded = read_json(tmp_path / "run" / "train" / "inputs.json")
    assert "warmup_ratio" not in recorded["training"]
    assert recorded["objective"]["init_args"].keys() == {"mu", "alpha", "ntp_on", "mixup_mean"}
    kept = contents(tmp_path / "run" / "train")
    capsys.readouterr()
    run(made)
    assert read_back(capsys.readouterr().out) == ["reference", "confidence", "split", "train", "base"]
    assert contents(tmp_path / "run" / "train") == kept
    run(replace(made, out=str(tmp_path / "beside")), pool=[tmp_path / "run"])
    assert (tmp_path / "beside" / "train" / "adopted.json").exists()


class Ending(Callback):
    """Ends the training of the target by an error behind its third step; it decides nothing."""

    gives = frozenset()

    def on_step_end(self, state):
        if state.stage == "train" and state.step == 3:
            raise RuntimeError("a power cut")


def test_a_run_that_was_begun_before_goes_on_to_the_same_bits(before, finished, tmp_path):
    made = config(finished.tiny, tmp_path / "run", every=2)
    ended = replace(made, callbacks=[Ending()])
    whole = replace(made, out=str(tmp_path / "whole"))
    context = before()
    with pytest.raises(Exception, match="a power cut"):
        run(ended)
    context.__exit__(None, None, None)
    run(made)
    run(whole)
    weights = [(tmp_path / name / "train/model/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    machines = [read_json(tmp_path / name / "train" / "figures.json")["machines"] for name in ("run", "whole")]
    assert machines[0] == machines[1]


def edited(finished, tmp_path: Path, change: Callable[[dict], object]) -> tuple[str, object]:
    """Return what a run says whose recorded inputs of the training were changed."""
    made = config(finished.tiny, tmp_path / "run")
    run(made)
    file = tmp_path / "run" / "train" / "inputs.json"
    recorded = read_json(file)
    change(recorded)
    file.write_text(json.dumps(recorded))
    with pytest.raises(ConfigError) as refused:
        run(made)
    return str(refused.value)


def test_an_option_that_is_not_known_here_is_refused_by_name(finished, tmp_path):
    said = edited(finished, tmp_path, lambda recorded: recorded["training"].update(final_ratio=0.5))
    assert "training.final_ratio: 0.5 -> nothing. Use another --out" in said


def test_an_input_that_is_no_option_has_no_default(finished, tmp_path):
    said = edited(finished, tmp_path, lambda recorded: recorded.pop("perturbation"))
    assert "perturbation: nothing -> None" in said


def test_a_raised_version_refuses_what_was_made_before(finished, tmp_path):
    made = config(finished.tiny, tmp_path / "run")
    run(made, until="split")
    stages = [replace(stage, version=2) if stage is SPLIT else stage for stage in STAGES]
    with pytest.raises(
        ConfigError, match="split: was made with other inputs: this version of the stage makes other files"
    ):
        run(made, until="split", stages=stages)


def test_a_value_other_than_the_default_is_refused_by_name():
    """Of a group and of a component, also inside another one's options and in lists; on either side."""
    old = {
        "training": {"epochs": 3},
        "objective": {"class_path": "sftmix.components.objectives.SFTMix", "init_args": {}},
    }
    default = old | {"training": {"epochs": 3, "weight_decay": GROUPS["training"]().weight_decay}}
    assert differences(old, default) == differences(default, old) == []
    given = old | {"training": {"epochs": 3, "weight_decay": 0.7}}
    assert differences(old, given) == [f"training.weight_decay: {GROUPS['training']().weight_decay!r} -> 0.7"]
    assert differences(old, old | {"objective": SFTMix().spec()}) == []
    assert differences(old, old | {"objective": SFTMix(mu=0.4).spec()}) == ["objective.mu: 0.2 -> 0.4"]
    one = {"class_path": AdamW().spec()["class_path"], "init_args": {}}
    assert differences({"a": [one]}, {"a": [AdamW().spec()]}) == []
    assert differences({"objective": NTP().spec()}, {"objective": SFTMix().spec()}) != []


def test_a_group_among_the_options_of_a_component_has_its_defaults():
    """As the adapters of a weaker reference model."""
    now = {"reference": TrainedReference(model=ReferenceModel(path="small", lora=LoraOptions(r=4))).spec()}
    before = deepcopy(now)
    del (
        before["reference"]["init_args"]["model"]["max_length"],
        before["reference"]["init_args"]["model"]["lora"]["bias"],
    )
    assert differences(before, now) == differences(now, before) == []
    now["reference"]["init_args"]["model"]["lora"]["bias"] = "all"
    assert differences(before, now) == ["reference.model.lora.bias: 'none' -> 'all'"]


def test_the_recorded_inputs_stay_as_they_are():
    recorded = {"lora": {"r": 8}, "training": {}}
    now = {"lora": {"r": 8, "alpha": 16.0}, "training": {"epochs": 1}}
    copied = json.loads(json.dumps(recorded))
    completed(recorded, now)
    assert recorded == copied


def test_a_configuration_of_before_is_read(finished, tmp_path):
    """It has max_steps beside the default of epochs, as a run writes all options, and lacks what came later."""
    made = config(finished.tiny, tmp_path / "run")
    assert made.training.max_steps
    run(made, until="split")
    file = tmp_path / "run" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith(("  timeout: ", "  warmup_ratio: "))))
    assert len(file.read_text().splitlines()) == len(lines) - 2
    assert read_config(file, "--trust") == made
