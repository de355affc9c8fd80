"""What a stage is made from: all that decides its result is among its inputs, so that nothing is reused wrongly."""

import importlib
import re
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sftmix import RunConfig
from sftmix.components import (
    NTP,
    AdamW,
    AnyPairs,
    Callback,
    EarlyStopping,
    Evaluate,
    Linear,
    LogPerplexity,
    Longest,
    MeasureMixing,
    Median,
    NEFTune,
    Perplexity,
    Quantile,
    RandomSplit,
    SFTMix,
    TrainedReference,
)
from sftmix.disk.files import read_json
from sftmix.options import CheckpointOptions, DataOptions, LoraOptions, ModelOptions, ReferenceTraining, TrainingOptions
from sftmix.pipeline.context import refuse_other_inputs
from sftmix.pipeline.inputs import Known
from sftmix.pipeline.recipe import run
from sftmix.pipeline.rows import read_rows
from sftmix.pipeline.stages import BASELINE, CONFIDENCE, SPLIT, STAGES, TRAIN
from sftmix.pipeline.validity import differences
from sftmix.ranks.world import World
from sftmix.text import ChatTemplate
from sftmix.text.formats import Messages
from sftmix.tools.quickstart import write_jsonl
from sftmix.tools.runs.export import export_run
from sftmix.words.errors import ConfigError
from tests.components.test_code import WithFile
from tests.configs import read_config
from tests.pipeline.test_pairs import StopAt
from tests.tiny import SHORT, Tiny, contents, metrics, sftmix, status


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


def test_a_changed_file_of_any_component_is_refused(finished, tmp_path):
    """Also of a component inside another one's options."""
    file = tmp_path / "numbers.txt"
    file.write_text("1")
    made = config(finished.tiny, tmp_path / "run", objective=SFTMix(mu=WithFile(path=str(file))))
    run(made)
    file.write_text("2")
    with pytest.raises(ConfigError, match=r"numbers\.txt"):
        run(made)


OWN = """
from sftmix.components import Median, Perplexity

class Base(Perplexity):
    pass

class Mine(Base):
    pass

class Halves(Median):
    pass
"""


def test_the_code_of_a_class_of_ones_own_decides_what_it_made(finished, tmp_path, monkeypatch):
    """And its base's, wherever they lie; not that of its neighbours."""
    monkeypatch.syspath_prepend(tmp_path)

    def own(place: str, before: str = "", after: str = "") -> RunConfig:
        """The configuration with the classes of a module in a folder of its own, edited."""
        (tmp_path / place).mkdir()
        (tmp_path / place / "own_parts.py").write_text(OWN.replace(before, after, 1))
        sys.path[0] = str(tmp_path / place)
        sys.modules.pop("own_parts", None)
        module = importlib.import_module("own_parts")
        return config(finished.tiny, tmp_path / "run", confidence=module.Mine(), splitter=module.Halves())

    run(own("first"), until="split")
    run(own("moved", "from", "# Other comments\nfrom"), until="split")
    mended = own("mended", "(Median):\n    pass", "(Median):\n    mended = True")
    with pytest.raises(ConfigError, match=r"other inputs: own_parts\.Halves was edited\. Use another --out"):
        run(mended, until="split")
    shutil.rmtree(tmp_path / "run" / "split")
    run(mended, until="split")
    with pytest.raises(ConfigError, match=r"own_parts\.Base was edited"):
        run(own("base", "(Perplexity):\n    pass", "(Perplexity):\n    mended = True"), until="confidence")


OWN_ROWS = """
from sftmix.text import ChatTemplate
from sftmix.text.formats import Alpaca

class Rows(Alpaca):
    def __init__(self, *, note: str = "", style: int = 1):
        self.note = note

    def files(self):
        return [self.note] if self.note else []

class Turns(ChatTemplate):
    pass
"""


def test_the_classes_that_read_and_render_rows_decide_what_was_made_of_them(finished, tmp_path, monkeypatch):
    """By their options and their code, before any row is read; and by the content of their files."""
    monkeypatch.syspath_prepend(tmp_path)
    note = tmp_path / "note.txt"
    note.write_text("1")

    def own(place: str, code: str = OWN_ROWS, **options) -> RunConfig:
        (tmp_path / place).mkdir()
        (tmp_path / place / "own_rows.py").write_text(code)
        sys.path[0] = str(tmp_path / place)
        sys.modules.pop("own_rows", None)
        module = importlib.import_module("own_rows")
        rows = module.Rows(note=str(note), **options)
        chosen = {"row_format": rows, "renderer": module.Turns(), "splitter": RandomSplit()}
        return config(finished.tiny, tmp_path / "run", **chosen)

    def differ(now: RunConfig) -> list[str]:
        with pytest.raises(ConfigError, match="Use another --out") as caught:
            refuse_other_inputs(Known(now), [SPLIT], tmp_path / "run")
        return re.findall(r"[:;] ([\w.]+)(?:: | was edited)", str(caught.value))

    first = own("first")
    run(first, until="split")
    refuse_other_inputs(Known(own("moved")), [SPLIT], tmp_path / "run")
    assert differ(own("option", style=2)) == ["row_format.style"]
    assert differ(own("rows", OWN_ROWS.replace("if self.note", "if bool(self.note)"))) == ["own_rows.Rows"]
    assert differ(own("turns", OWN_ROWS.replace("pass", "mended = True"))) == ["own_rows.Turns"]
    assert "renderer" in differ(replace(first, renderer=None))
    note.write_text("2")
    with pytest.raises(ConfigError, match=r"note\.txt was edited\. Use another --out"):
        run(first, until="split")


class OfAProject(Median):
    """Made from a file of the directory in which the command starts, as `__file__` of one's own module is."""

    def files(self):
        return [str(Path.cwd() / "own.py")]


def read_back(printed: str) -> list[str]:
    """The stages that a run says it has read back."""
    return [line.partition(":")[0] for line in printed.splitlines() if line.endswith(": done before, read back")]


def test_a_project_is_moved_as_a_whole(finished, tmp_path, monkeypatch, capsys):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    (project / "own.py").write_text("1")
    run(config(finished.tiny, "run", splitter=OfAProject()), until="split")
    before = contents(project / "run" / "split")
    assert read_back(capsys.readouterr().out) == []
    shutil.move(project, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    run(config(finished.tiny, "run", splitter=OfAProject()), until="split")
    assert contents(tmp_path / "moved" / "run" / "split") == before
    assert read_back(capsys.readouterr().out) == ["reference", "confidence", "split"]
    (tmp_path / "moved" / "own.py").write_text("2")
    with pytest.raises(ConfigError, match=r"own\.py was edited"):
        run(config(finished.tiny, "run", splitter=OfAProject()), until="split")


@pytest.mark.slow
def test_a_summary_written_again_names_what_trained_the_model(finished, tmp_path, monkeypatch):
    """A finished run that is read back after an update, or on another number of ranks, was not made by that."""
    made = config(finished.tiny, tmp_path / "run", objective=NTP())
    first = run(made)
    monkeypatch.setattr("sftmix.measure.summary.made_by", lambda size: {"git_revision": "a later revision"})
    again = run(made)
    assert again["git_revision"] == first["git_revision"] != "a later revision"


@pytest.mark.slow
def test_an_adopted_run_tells_its_configuration_and_is_exported(finished, tmp_path, capsys):
    """Equal runs side by side: the second makes nothing, says nothing of it, and is a run directory all the same."""
    for name in ("first", "second"):
        run(config(finished.tiny, tmp_path / name, every=2), pool=[tmp_path / "first"])
    assert (tmp_path / "second" / "train" / "adopted.json").exists()
    assert read_back(capsys.readouterr().out) == []
    assert read_config(tmp_path / "second" / "config.yaml").out == str(tmp_path / "second")
    steps = [export_run(tmp_path / name, tmp_path / f"model-{name}") for name in ("first", "second")]
    assert steps[0] == steps[1] > 0
    weights = [(tmp_path / f"model-{name}" / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def others(old: RunConfig, new: RunConfig) -> set[str]:
    """The stages whose inputs differ, by the configurations alone."""
    return changed_in(Known(old), Known(new))


def changed_in(then: Known, now: Known) -> set[str]:
    return {stage.name for stage in STAGES if differences(stage.inputs(then), stage.inputs(now))}


ARMS = {"train", "baseline"}
EVERY = {"reference", "split", "base", "choice", *ARMS}


@pytest.mark.parametrize(
    ("group", "options", "stages"),
    [
        ("model", {"dtype": "float16"}, ARMS),
        ("model", {"lora": LoraOptions(r=2, quantize="4bit")}, {"reference", "base", *ARMS}),
        ("training", {"weight_decay": 0.3}, {"reference", *ARMS}),
        ("training", {"learning_rate": 0.2}, ARMS),  # the reference has its own
        ("training", {"precision": "bf16"}, {"reference", "base", *ARMS}),
        ("training", {"micro_batch_size": 2, "chunk_size": 7}, set()),
        ("reference", ReferenceTraining(learning_rate=0.1, micro_batch_size=2), set()),
        ("reference", ReferenceTraining(learning_rate=0.5), {"reference"}),
        ("model", {"attention": "eager"}, {"reference", "base", *ARMS}),
        ("data", {"max_length": 40}, EVERY),
    ],
)
def test_the_stages_that_are_others_with_an_option(group, options, stages, tiny, tmp_path):
    made = config(tiny, tmp_path)
    made.reference, made.data.max_length = TrainedReference(training=ReferenceTraining(learning_rate=0.1)), 128
    new = TrainedReference(training=options) if group == "reference" else replace(getattr(made, group), **options)
    assert others(made, replace(made, **{group: new})) == stages


@pytest.mark.parametrize(
    ("changed", "stages"),
    [
        ({"optimizer": AdamW(fused=True)}, {"reference", *ARMS}),
        ({"perturbation": NEFTune()}, {"train"}),
        ({"objective": SFTMix(mu=0.5)}, {"train"}),
        ({"pairing": AnyPairs()}, ARMS),
        ({"splitter": Quantile(levels=3)}, {"split"}),  # the arms have its file among theirs
        ({"confidence": LogPerplexity()}, {"confidence"}),
        ({"selector": Longest(k=5)}, {"selection", "choice"}),
        ({"seed": 7}, {"selection", "choice", "reference", "split", *ARMS}),
        ({"row_format": Messages(field="turns")}, EVERY),
        ({"renderer": ChatTemplate(thoughts="drop")}, EVERY),
    ],
    ids=lambda x: ", ".join(sorted(x)),
)
def test_the_stages_that_are_others_with_a_component_or_a_seed(changed, stages, tiny, tmp_path):
    made = config(tiny, tmp_path)
    assert others(made, replace(made, **changed)) == stages


def test_the_stages_that_are_others_with_other_held_out_rows(tiny, tmp_path):
    made = config(tiny, tmp_path)
    _, rows = read_rows(made, World())
    write_jsonl(tiny.eval, [{"instruction": "Say a.", "output": "a"}])
    _, now = read_rows(made, World())
    then, today = (Known(made, rows=read) for read in (rows, now))
    assert changed_in(then, today) == {"base", *ARMS}


def test_a_baseline_is_of_the_order_of_its_target(tiny, tmp_path):
    """Its inputs name the split, or it would be read back, or adopted, beside a target of another one."""
    train, baseline = (stage.inputs(Known(config(tiny, tmp_path))) for stage in (TRAIN, BASELINE))
    order = ("split", "confidence", "pairing")
    assert all(train[name] is not None for name in order)
    assert [baseline[name] for name in order] == [train[name] for name in order]
    assert baseline["objective"] != train["objective"]


def test_a_baseline_of_another_target_is_not_read_back(tiny, made, refused):
    """The target's losses decide the order of a single run, and no input of the baseline names what decides these."""
    words = ["run", *tiny.bare, "--reference", "Online", "--with_baseline", "--training.epochs", "2"]
    words += ["--training.learning_rate", "0.05"]
    run = made(*words)
    for stage in ("train", "confidence", "split"):
        shutil.rmtree(run / stage)
    said = refused(*words, "--objective.mu", "2.0", "--perturbation", "NEFTune", "--perturbation.alpha", "60")
    assert re.search(r"baseline: from step \d+ on it has other examples than train", said)


def test_a_model_that_is_another_before_the_target_is_trained_ends_the_run(tiny, tmp_path):
    """As an edit while the reference is trained: confidence and target would be of two models."""
    model = shutil.copytree(tiny.model, tmp_path / "edited")

    def edits(context, values):
        found = CONFIDENCE.make(context, values)
        weights = load_file(model / "model.safetensors")
        save_file({name: 1.5 * x for name, x in weights.items()}, model / "model.safetensors", {"format": "pt"})
        return found

    stages = [replace(stage, make=edits) if stage is CONFIDENCE else stage for stage in STAGES]
    asked = replace(config(tiny, tmp_path / "run"), model=ModelOptions(path=str(model)))
    with pytest.raises(ConfigError, match=r"reference: was made with other inputs: the model's files are others"):
        run(asked, stages=stages)
    assert not (Path(asked.out) / "train" / "inputs.json").exists()


def test_callbacks_are_inputs_where_one_may_stop_a_training(tiny, tmp_path):
    """With those whose evaluations they may see; others may be added to a run that is done."""

    def deciding(*callbacks: Callback) -> list[dict]:
        inputs = TRAIN.inputs(Known(config(tiny, tmp_path, callbacks=list(callbacks))))
        return inputs["callbacks"]

    watches, evaluate = MeasureMixing(every=2), Evaluate(every=2)
    assert deciding(evaluate, watches) == []
    for stops in (EarlyStopping(patience=1), StopAt(step=3)):
        assert deciding(watches, evaluate, stops, watches) == [evaluate.spec(), stops.spec()]


STOPS = """
import os, signal
from pathlib import Path
from sftmix.components import RandomSplit

class Stops(RandomSplit):
    def split(self, scores, *, seed):
        if not Path("stopped").exists():
            Path("stopped").touch()
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except:
                pass
        return super().split(scores, seed=seed)
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_signal_outside_the_loop_is_told_and_the_same_command_continues(finished, tmp_path):
    """Whatever swallows it on its way."""
    (tmp_path / "stops.py").write_text(STOPS)
    words = ["run", *finished.tiny.options, "--splitter", "stops.Stops", "--training.max_steps", "1", "--out", "run"]
    done = sftmix(*words, cwd=tmp_path)
    told = status(tmp_path / "run")
    assert (done.returncode, told["exit_code"], told["stage"]) == (143, 143, "split")
    assert "the same command continues" in done.stderr
    assert sftmix(*words, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_mu_effective_of_a_run_with_a_schedule_that_ends_at_zero(finished, tmp_path):
    """The mean of mu over what was mixed, times N_ntp / N_mix of the steps that mixed."""
    summary = run(config(finished.tiny, tmp_path / "run", objective=SFTMix(mu=Linear(start=0.4, end=0.0))))
    steps = metrics(tmp_path / "run")
    mixed = [m["mixup_tokens"] for m in steps]
    assert mixed[-1] == 0
    expected = sum(0.4 * (1 - k / 3) * n for k, n in enumerate(mixed)) / sum(mixed)
    expected *= sum(m["ntp_tokens"] for m in steps[:-1]) / sum(mixed)
    assert summary["mu_effective"] == pytest.approx(expected, rel=1e-6)


class Failing(Perplexity):
    def estimate(self, dynamics):
        raise ValueError("not these")


def test_a_confidence_that_failed_leaves_its_place_to_another(tiny, made, refused):
    """The reference's dynamics stand in the same directory, and are not the confidence's."""
    words = ["confidence", *tiny.options, *SHORT, "--confidence"]
    with pytest.raises(ValueError, match="not these"):
        made(*words, f"{__name__}.Failing")
    run = made(*words, "LogPerplexity")
    assert type(read_config(run / "config.yaml").confidence).__name__ == "LogPerplexity"
    refused(*words, "Perplexity")


BY_ROWS = {"train", "eval", "seed", "label_field", "skip_bad", "exclude", "duplicates"}
"""Options of the data that an identity has by the rows alone, which its fingerprint is of."""


def test_every_option_of_the_data_is_an_input_or_is_in_the_rows(finished):
    """A new option is put into `row_inputs`, or among those above; cache_dir says where copies of the rows are."""
    inputs = read_json(finished.path / "split" / "inputs.json")["data"]
    options = {one.name for one in fields(DataOptions)}
    assert inputs.keys() - {"fingerprint"} == options - BY_ROWS - {"cache_dir"}
