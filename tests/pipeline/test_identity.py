"""What a stage is made from: all that decides its result is among its inputs, so that nothing is reused wrongly."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sftmix import RunConfig
from sftmix.common.errors import ConfigError
from sftmix.common.tables import read_dynamics, write_dynamics
from sftmix.components import (
    NTP,
    Callback,
    ConfidenceGapPairs,
    Evaluate,
    FromCheckpoints,
    Linear,
    PairSampler,
    RandomPairs,
    RandomSplit,
    SFTMix,
)
from sftmix.components.base import CallbackResult
from sftmix.components.reference import FromFile
from sftmix.config.read import read_config
from sftmix.model.load import fingerprint
from sftmix.options import CheckpointOptions, DataOptions, LoraOptions, ModelOptions, TrainingOptions
from sftmix.pipeline.directory import differences
from sftmix.pipeline.finished import export_run
from sftmix.pipeline.identity import STAGE_INPUTS, Known, arm_inputs
from sftmix.pipeline.recipe import run
from tests.tiny import SHORT, Tiny, groups, metrics, sftmix, status, table


def config(tiny: Tiny, out: Path, *, precision: str = "fp32", every: int = 0, **rest) -> RunConfig:
    return RunConfig(
        out=str(out),
        model=ModelOptions(path=str(tiny.model)),
        data=DataOptions(train=str(tiny.train), eval=str(tiny.eval)),
        training=TrainingOptions(
            global_batch_size=8, micro_batch_size=4, max_steps=4, learning_rate=1e-2, precision=precision
        ),
        checkpoint=CheckpointOptions(every=every),
        **rest,
    )


def losses(run_directory: Path) -> list[float]:
    return [m["loss"] for m in metrics(run_directory)]


@pytest.fixture
def two_rankings(finished, tmp_path) -> list[Path]:
    """Two files of dynamics with the same halves and another order inside them."""
    dynamics = read_dynamics(finished.path / "confidence" / "dynamics.parquet")
    half = groups(finished.path)
    rng, nll = np.random.default_rng(0), dynamics.nll_sum.copy()
    for name in ("confident", "unconfident"):
        rows = np.array([i for i, example in enumerate(dynamics.ids) if half[example] == name])
        mean = dynamics.nll_sum[rows] / dynamics.n_tokens[rows, None]
        nll[rows] = rng.permutation(mean) * dynamics.n_tokens[rows, None]
    found = [tmp_path / "one.parquet", tmp_path / "other.parquet"]
    for path, sums in zip(found, (dynamics.nll_sum, nll), strict=True):
        write_dynamics(path, replace(dynamics, nll_sum=sums, token_nll=None))
    return found


@pytest.mark.slow
def test_pairs_by_confidence_are_not_those_of_another_confidence(finished, two_rankings, tmp_path):
    """The halves are the same, the pairs are not: a sibling's training is no stand-in."""
    made = []
    for number, dynamics in enumerate(two_rankings):
        for name, pool in (("alone", []), ("beside", [tmp_path / "beside-0"])):
            out = tmp_path / f"{name}-{number}"
            reference = FromFile(path=str(dynamics))
            run(config(finished.tiny, out, reference=reference, pairing=ConfidenceGapPairs()), pool=pool)
            made.append(out)
    assert groups(made[0]) == groups(made[2])
    assert losses(made[0]) != losses(made[2])
    assert losses(made[2]) == losses(made[3])


def test_models_on_disk_are_scored_again_in_another_precision(finished, tmp_path):
    scored = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        reference = FromCheckpoints(paths=[str(finished.tiny.model)])
        made = config(finished.tiny, out, precision=precision, reference=reference)
        run(made, until="split", pool=[tmp_path / "fp32"])
        scored.append(table(out / "confidence" / "dynamics.parquet")["nll_sum"])
    assert scored[0] != scored[1]


class FromAFile(PairSampler):
    """Pairs that depend on a file."""

    def __init__(self, *, path: str):
        self.path = path

    def files(self):
        return [self.path]

    def pairs(self, split, scores, *, epoch, seed):
        return RandomPairs().pairs(split, scores, epoch=epoch, seed=int(Path(self.path).read_text()))


class WithFile(Linear):
    def __init__(self, *, path: str):
        super().__init__(start=0.0, end=0.4)
        self.path = path

    def files(self):
        return [self.path]


@pytest.mark.parametrize("place", ["pairing", "schedule"])
def test_a_changed_file_of_any_component_is_refused(finished, tmp_path, place):
    """Also of a component inside another one's options."""
    file = tmp_path / "numbers.txt"
    file.write_text("1")
    chosen = {
        "pairing": {"pairing": FromAFile(path=str(file))},
        "schedule": {"objective": SFTMix(mu=WithFile(path=str(file)))},
    }[place]
    run(config(finished.tiny, tmp_path / "run", **chosen))
    file.write_text("2")
    with pytest.raises(ConfigError, match=r"numbers\.txt"):
        run(config(finished.tiny, tmp_path / "run", **chosen))


def test_a_model_is_another_one_with_another_template(finished, tmp_path):
    model = shutil.copytree(finished.tiny.model, tmp_path / "model")
    before = fingerprint(str(model))
    template = model / "chat_template.jinja"
    template.write_text((template.read_text() if template.exists() else "") + " ")
    assert fingerprint(str(model)) != before


def test_a_summary_written_again_names_what_trained_the_model(finished, tmp_path, monkeypatch):
    """A finished run that is read back after an update, or on another number of ranks, was not made by that."""
    made = config(finished.tiny, tmp_path / "run", objective=NTP())
    first = run(made)
    monkeypatch.setattr("sftmix.measure.summary.git_revision", lambda: "a later revision")
    again = run(made)
    assert [again[key] for key in ("git_revision", "version", "world_size")] == [
        first[key] for key in ("git_revision", "version", "world_size")
    ]
    assert again["git_revision"] != "a later revision"


def test_an_adopted_run_tells_its_configuration_and_is_exported(finished, tmp_path):
    """Equal runs side by side: the second makes nothing, and is a run directory all the same."""
    for name in ("first", "second"):
        run(config(finished.tiny, tmp_path / name, every=2), pool=[tmp_path / "first"])
    assert (tmp_path / "second" / "train" / "adopted.json").exists()
    assert read_config(tmp_path / "second" / "config.yaml").out == str(tmp_path / "second")
    exported = [export_run(tmp_path / name, tmp_path / f"model-{name}") for name in ("first", "second")]
    weights = [(path / "model.safetensors").read_bytes() for path in exported]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_base_model_is_measured_anew_where_its_figures_would_be_others(finished, tmp_path):
    tiny = finished.tiny
    plain = {"objective": NTP(), "pairing": None}

    def other(name: str, **changes) -> set[str]:
        """The stages that are adopted from the first run; a change is one of options, or options of the group."""
        made = config(tiny, tmp_path / name, **plain)
        for key, value in changes.items():
            group = getattr(made, key)
            setattr(made, key, replace(group, **value) if isinstance(value, dict) else value)
        run(made, pool=[tmp_path / "first"])
        return {file.parent.name for file in (tmp_path / name).glob("*/adopted.json")}

    assert other("first") == set()
    assert other("equal") == {"train", "base"}
    for number, change in enumerate(
        [
            {"seed": 7},
            {"training": {"learning_rate": 1e-3}},
            {"model": {"lora": LoraOptions(r=2)}},
            {"objective": NTP(), "pairing": RandomPairs(), "splitter": RandomSplit()},
        ]
    ):
        assert other(f"same-{number}", **change) == {"base"}, change
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(line + "\n" for line in tiny.eval.read_text().splitlines()[:3]))
    for number, change in enumerate(
        [
            {"training": {"precision": "bf16"}},
            {"model": {"attention": "eager"}},
            {"data": {"eval": [str(held_out)]}},
            {"data": {"max_length": 40}},
            {"data": {"limit": 20}},
        ]
    ):
        assert other(f"other-{number}", **change) == set(), change


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"dtype": "float16"}, {"train", "baseline"}),
        ({"lora": LoraOptions(r=2, quantize="4bit")}, {"reference", "train", "baseline", "base"}),
    ],
)
def test_the_stages_that_are_others_with_another_dtype_or_a_base_in_4_bits(options, stages, tiny, tmp_path):
    made = config(tiny, tmp_path)
    old, new = Known(made), Known(replace(made, model=replace(made.model, **options)))
    assert {name for name, inputs in STAGE_INPUTS.items() if differences(inputs(old), inputs(new))} == stages


class StopsAfter(Callback):
    def __init__(self, *, step: int):
        self.step = step

    def on_step_end(self, state):
        return CallbackResult(stop=state.step == self.step)


def test_callbacks_behind_the_last_that_may_stop_a_training_are_no_inputs(tiny, tmp_path):
    callbacks = [Evaluate(every=2), StopsAfter(step=3), Evaluate(every=3)]
    inputs = arm_inputs(Known(config(tiny, tmp_path, callbacks=callbacks)), "train")
    assert inputs["callbacks"] == [callback.spec() for callback in callbacks[:2]]


def test_the_status_of_a_run_that_a_callback_stopped_is_that_of_its_training(finished, tmp_path):
    made = config(finished.tiny, tmp_path / "run", objective=NTP(), pairing=None, callbacks=[StopsAfter(step=3)])
    assert run(made)["stages"]["train"]["total_steps"] == 4
    told = status(tmp_path / "run")
    assert [told[key] for key in ("stage", "step", "total_steps", "exit_code")] == ["train", 3, 4, 0]


STOPS = """
import os, signal
from pathlib import Path
from sftmix.components import RandomSplit

def at_once():
    os.kill(os.getpid(), signal.SIGTERM)

def caught():
    try:
        at_once()
    except Exception:
        pass

def swallowed():
    try:
        at_once()
    except:
        pass

def renamed():
    try:
        at_once()
    except BaseException as error:
        raise ImportError("could not be imported") from error

class Stops(RandomSplit):
    def split(self, scores, *, seed):
        if not Path("stopped").exists():
            Path("stopped").touch()
            HOW()
        return super().split(scores, seed=seed)
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("how", ["at_once", "caught", "swallowed", "renamed"])
def test_a_signal_outside_the_loop_is_told_and_the_same_command_continues(finished, tmp_path, how):
    """Whatever catches it on its way: every Exception, everything, or to say something else of it."""
    (tmp_path / "stops.py").write_text(STOPS.replace("HOW", how))
    words = ["run", *finished.tiny.options, "--splitter", "stops.Stops", "--training.max_steps", "1", "--out", "run"]
    done = sftmix(*words, cwd=tmp_path)
    told = status(tmp_path / "run")
    assert (done.returncode, told["exit_code"], told["stage"]) == (143, 143, "split")
    assert "Traceback" not in done.stderr
    assert "the same command continues" in done.stderr
    assert sftmix(*words, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("mean", ["own", "ntp"])
def test_mu_effective_of_a_run_with_a_schedule_that_ends_at_zero(finished, tmp_path, mean):
    """The mean of mu over what was mixed; times N_ntp / N_mix of the steps that mixed where Mixup has its own mean."""
    made = config(finished.tiny, tmp_path / "run", objective=SFTMix(mu=Linear(start=0.4, end=0.0), mixup_mean=mean))
    summary = run(made)
    steps = metrics(tmp_path / "run")
    mus = [0.4 * (1 - k / 3) for k in range(4)]
    mixed = [m["mixup_tokens"] for m in steps]
    assert mixed[-1] == 0
    expected = sum(mu * n for mu, n in zip(mus, mixed, strict=True)) / sum(mixed)
    if mean == "own":
        expected *= sum(m["ntp_tokens"] for m in steps if m["mixup_tokens"]) / sum(mixed)
    assert summary["mu_effective"] == pytest.approx(expected, rel=1e-6)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["mu_effective"] == summary["mu_effective"]


@pytest.mark.parametrize(
    "first", [("--reference", "Online"), ("--splitter", "RandomSplit")], ids=["single run", "random"]
)
def test_a_refused_objective_begins_no_stage_and_leaves_the_configuration(sftmix, tiny, tmp_path, first):
    """Plain NTP has no use for a split: that of the run before is not asked for a reference first."""
    options = [w for w in tiny.options if w not in ("--reference.checkpoints", "2")]  # Online has none
    words = ["run", *options, *SHORT, "--training.max_steps", "8", "--out", str(tmp_path / "run")]
    assert sftmix(*words, *first).code == 0
    there = sorted(path.name for path in (tmp_path / "run").iterdir())
    written = (tmp_path / "run" / "config.yaml").read_bytes()
    refused = sftmix(*words, *(first if first[0] == "--reference" else ()), "--objective", "NTP")
    assert refused.code == 2
    assert "train: was made with other inputs" in refused.err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == there
    assert (tmp_path / "run" / "config.yaml").read_bytes() == written


def test_a_split_that_needs_no_confidence_is_told_of_without_any(sftmix, tiny, tmp_path):
    """`reference` after it makes dynamics, and no confidence."""
    words = [*tiny.options, *SHORT, "--splitter", "RandomSplit", "--out", str(tmp_path / "run")]
    assert sftmix("split", *words).code == 0
    assert sftmix("reference", *words).code == 0
    assert not (tmp_path / "run" / "confidence" / "confidence.parquet").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["confidence"]["half_a"]["examples"] == 14
    assert summary["confidence"]["half_a"]["confidence_mean"] is None
