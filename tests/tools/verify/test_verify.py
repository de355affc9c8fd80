"""`sftmix verify`: an honest run is certified; a changed row, seed, weight or loss is found, whatever was mended."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.config.read import read_yaml
from sftmix.disk.tables import read_columns, write_table
from sftmix.tools.verify.window import window_of
from sftmix.words.errors import ConfigError
from tests.tiny import metrics
from tests.tools.verify.runs import certified, differing, made, one_bit_of_a_weight, replaced, unfinished, with_line

# ----------------------------------------------------------------------------------------- honest runs


def written(run: Path) -> dict[Path, int]:
    """When each file and directory was written to."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_an_honest_run_is_certified_and_not_touched(ntp, sftmix):
    before = written(ntp.run)
    done = sftmix("verify", str(ntp.run))
    assert done.code == 0, done.err
    *lines, sentence = done.out.splitlines()
    kinds = ["files", "inputs", "examples", "losses", "weights", "model", "model", *["figures"] * 5]
    assert [line.split()[:2] for line in lines] == [[kind, "same:"] for kind in kinds]
    assert "checkpoints/step-00000006, " in lines[4]
    assert sentence == "steps 5 to 6 of train replayed: examples, losses, weights are the same, bit for bit"
    assert written(ntp.run) == before


@pytest.mark.parametrize(
    "name", ["confidence/confidence.parquet", "confidence/dynamics.parquet", "split/split.parquet"]
)
def test_a_table_that_was_removed_is_a_difference(name, honest, tmp_path, sftmix):
    run = Path(shutil.copytree(honest.run, tmp_path / "run"))
    (run / name).unlink()
    done = sftmix("verify", str(run))
    assert done.code == 4
    assert f"{name.partition('/')[2]} is missing" in done.out
    assert "inputs    differs: " in done.out


@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
def test_a_run_whose_ranks_shared_the_weights_wants_torchrun_before_anything_else(parallel, copy, sftmix):
    replaced("parallel: auto", f"parallel: {parallel}")(copy.run / "config.yaml")
    done = sftmix("verify", str(copy.run))
    assert done.code == 2
    assert done.err.startswith(f"error: training.parallel {parallel} needs torchrun: torchrun --nproc_per_node 1 ")


def with_column(name: str, change: Callable[[pd.Series], pd.Series]) -> Callable[[Path], None]:
    """Change a column of a table."""

    def change_file(file: Path) -> None:
        table = pq.read_table(file)
        frame = table.to_pandas()
        frame[name] = change(frame[name]).to_numpy()
        changed = pa.Table.from_pandas(frame, schema=table.schema.remove_metadata(), preserve_index=False)
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), file)

    return change_file


SPLIT = [
    "confidence/confidence.parquet, id, confidence, variability, bit for bit",
    "split/split.parquet, id, group, bit for bit",
]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "reference", "baseline"])
def test_each_stage_is_certified_from_the_base_model_to_its_end(honest, sftmix, stage):
    found = certified(sftmix, str(honest.run), "--stage", stage, "--from", "0", "--steps", "6")
    assert (found.code, found.same, found.exact, found.to) == (0, True, True, 6)
    assert (found.machine["run"], found.machine["different"]) == ([found.machine["replay"]], [])
    assert sum(finding["same"] is None for finding in found.findings) == 0
    assert [f["note"] for f in found.findings if f["kind"] == "split"] == SPLIT * (stage != "reference")


@pytest.mark.slow
def test_a_single_run_is_certified_across_its_epochs(tmp_path, sftmix):
    """Four steps are an epoch, and its losses divide the next one."""
    run = made(tmp_path, "--reference", "Online", "--training.max_steps", "8").run
    found = certified(sftmix, str(run), "--from", "2", "--steps", "6")
    assert (found.code, found.exact) == (0, True)
    assert metrics(run)[5]["mixup"] > 0
    notes = [finding["note"] for finding in found.findings]
    assert [note for note in SPLIT if note not in notes] == []
    assert any(note.startswith("train/online/epoch-000.parquet") for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("confidence/confidence.parquet", with_column("confidence", lambda values: -values), "split"),
        ("split/split.parquet", with_column("group", lambda values: values[::-1]), "split"),
        ("train/online/epoch-000.parquet", with_column("nll_sum", lambda values: values / 2), "figures"),
    ],
)
def test_what_a_single_run_has_made_of_its_losses_is_made_again(tmp_path, sftmix, name, change, kind):
    copy = made(tmp_path, "--reference", "Online", "--training.max_steps", "8")
    copy.edit(name, change)
    found = certified(sftmix, str(copy.run), "--from", "0", "--steps", "8")
    assert (found.code, found.exact) == (4, False)
    assert kind in differing(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_files_of_the_model_beside_its_weights_are_compared(tmp_path, sftmix, name):
    """A factor of adapters, or a template, makes another model of the same weights."""
    copy = made(tmp_path, "--model.lora.r", "2")
    assert certified(sftmix, str(copy.run)).exact
    changes = {"adapter_config.json": ('"lora_alpha": ', '"lora_alpha": 1'), "tokenizer_config.json": ("{", '{"x": 1,')}
    copy.edit(f"train/model/{name}", replaced(*changes.get(name, ("{", "EVIL {"))))
    found = certified(sftmix, str(copy.run))
    assert (found.code, differing(found)) == (4, {"model"})
    assert any(name in finding["note"] for finding in found.findings if finding["same"] is False)


@pytest.mark.slow
def test_an_unfinished_run_is_certified_as_far_as_it_came(copy, sftmix):
    """What a kill after step 6 leaves, if its last checkpoint was that of step 4."""
    unfinished(copy.run, after=4)
    found = certified(sftmix, str(copy.run), "--from", "4")
    assert (found.code, found.same, found.exact, found.to) == (0, True, False, 6)
    said = "examples, losses are the same, bit for bit; not compared, at least in part: weights"
    assert found.sentence == f"steps 5 to 6 of train replayed: {said}"
    assert [f["note"] for f in found.findings if f["same"] is None] == [
        "the run kept none of step 6 as they were trained"
    ]


# ----------------------------------------------------------------------------------------- changed runs


@pytest.mark.parametrize(
    ("name", "change", "kind", "told"),
    [
        ("train/model/model.safetensors", one_bit_of_a_weight, "model", "; 1 of "),
        ("train/metrics.jsonl", with_line(5, "ntp", lambda was: was * (1 + 1e-15)), "losses", ", ntp, step 5; 1 of 2 "),
        ("train/metrics.jsonl", with_line(5, "rows", lambda was: was[::-1]), "examples", ", rows, step 5; 1 of 2 "),
    ],
    ids=["weight", "loss", "rows"],
)
def test_a_change_is_found_though_its_hash_was_mended(ntp, copy_of_ntp, sftmix, name, change, kind, told):
    copy_of_ntp.edit(name, change)
    found = certified(sftmix, str(copy_of_ntp.run))
    (finding,) = (f for f in found.findings if f["same"] is False)
    assert (found.code, finding["kind"], told in finding["note"]) == (4, kind, True)
    if kind != "model":
        entry = told.split(", ")[1]
        expected, now = (metrics(run)[4][entry] for run in (copy_of_ntp.run, ntp.run))
        assert finding["note"].endswith(f"differ: expected {expected}, found {now}")


def with_figure(*keys: str) -> Callable[[Path], None]:
    """Change a number of a JSON file in its last digits."""

    def change(file: Path) -> None:
        figures = inner = json.loads(file.read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] *= 1 + 1e-8
        file.write_text(json.dumps(figures))

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keys", "of_summary", "told"),
    [
        (
            "split/figures.json",
            ["confidence", "confident", "confidence_mean"],
            ["confidence", "confident", "confidence_mean"],
            "split, confidence.confident.c",
        ),
        pytest.param(
            *("split/confounds.json", ["spearman_confidence_length"], None, "split/confounds.json, spearman_"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("train/figures.json", ["mu_effective"], ["mu_effective"], "measured again, mu_effective; "),
            marks=pytest.mark.long,
        ),
        ("base/figures.json", ["eval_nll"], ["eval_nll_before"], "base, eval_nll; "),
    ],
)
def test_a_falsified_figure_is_found_with_a_summary_to_match(copy, sftmix, name, keys, of_summary, told):
    """Every finished stage is made again from the base model to its end."""
    copy.edit(name, with_figure(*keys))
    if of_summary:
        with_figure(*of_summary)(copy.run / "summary.json")
    found = certified(sftmix, str(copy.run), "--from", "0", "--steps", "6")
    differ = [finding["note"] for finding in found.findings if finding["same"] is False]
    assert (found.code, found.exact, len(differ), told in differ[0]) == (4, False, 1, True), differ


@pytest.mark.slow
def test_a_changed_row_is_found_even_where_all_records_were_mended(copy, sftmix):
    text = copy.tiny.train.read_bytes()
    copy.tiny.train.write_bytes(text.replace(b'"output": "', b'"output": "x', 1))
    found = certified(sftmix, str(copy.run))
    assert (found.code, differing(found)) == (4, {"inputs"})
    notes = [finding["note"] for finding in found.findings]
    (was, now) = next(re.findall("'(.+?)'", note) for note in notes if "train: data.fingerprint" in note)
    for stage in ("reference", "split", "train"):
        replaced(was, now)(copy.run / stage / "inputs.json")
    shutil.rmtree(copy.run / "train" / "checkpoints")
    found = certified(sftmix, str(copy.run))
    assert (found.code, differing(found)) == (4, {"split"})
    assert "confidence.parquet: it is of other examples than the 29 rows" in found.findings[-1]["note"]


def other_eval(file: Path) -> None:
    table = read_columns(file, "id", "nll_sum", "n_tokens", "n_correct", "brier_sum")
    ids, _ = table.pop("id"), table.pop("metadata")
    write_table(file, ids, **table | {"nll_sum": table["nll_sum"] * (1 + 1e-15)})


FIGURES = {
    "train/eval.parquet": other_eval,
    "train/figures.json": replaced('"eval_nll": ', '"eval_nll": 1'),
    "train/calibration.json": replaced('"count": ', '"count": 1'),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_changed_figure_is_found_though_its_hash_was_mended(copy, sftmix, name):
    """The final weights are in a checkpoint: the held-out rows are scored again."""
    copy.edit(name, FIGURES[name])
    found = certified(sftmix, str(copy.run), "--stage", name.partition("/")[0])
    assert (found.code, differing(found)) == (4, {"figures"})
    note = next(f["note"] for f in found.findings if f["same"] is False)
    assert note.startswith("measured again, eval_nll" if name == "train/figures.json" else name)


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("summary.json", replaced('"eval_nll_after": ', '"eval_nll_after": 1'), "figures"),
        ("base/sample.parquet", lambda file: file.write_bytes(bytes(file.stat().st_size)), "files"),
        ("train/checkpoints/step-00000004/state.json", lambda file: file.write_text('{"identity": '), "files"),
    ],
)
def test_a_changed_file_is_found(copy_of_ntp, sftmix, name, change, kind):
    change(copy_of_ntp.run / name)
    found = certified(sftmix, str(copy_of_ntp.run))
    assert (found.code, differing(found)) == (4, {kind})


def test_a_name_of_the_model_that_the_configuration_lacks_is_a_difference(copy_of_ntp, sftmix):
    """As a stranger's may: the command reads it, and the summary has the model's name."""
    values = read_yaml(copy_of_ntp.run / "config.yaml")
    del values["model"]
    (copy_of_ntp.run / "config.yaml").write_text(json.dumps(values))
    tiny = copy_of_ntp.tiny
    words = ["--model.path", str(tiny.model), "--data.train", str(tiny.train), "--data.eval", str(tiny.eval)]
    found = certified(sftmix, str(copy_of_ntp.run), *words)
    assert (found.code, differing(found)) == (4, {"figures"})


# -------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("stage", "start", "steps", "words"),
    [
        ("train", 3, None, "--from is 3, .* allowed: 0, 2, 4 "),
        ("train", 6, None, "--from is 6, .* allowed: 0, 2, 4 "),
        ("train", 2, 0, "--steps is 0; allowed: 1 to 4"),
        ("train", 2, 5, "--steps is 5; allowed: 1 to 4"),
    ],
)
def test_steps_that_are_not_there_are_refused(ntp, stage, start, steps, words):
    with pytest.raises(ConfigError, match=words):
        window_of(ntp.run, stage, start, steps)


def test_stages_that_are_not_there_or_of_another_run_are_refused(copy_of_ntp):
    with pytest.raises(ConfigError, match=r"--stage baseline: .* has no steps of this stage"):
        window_of(copy_of_ntp.run, "baseline")
    with pytest.raises(ConfigError, match="is not a run directory"):
        window_of(copy_of_ntp.run / "train")
    (copy_of_ntp.run / "train" / "adopted.json").write_text('{"from": "../../other/train"}')
    with pytest.raises(ConfigError, match=rf"verify the run that made it, {copy_of_ntp.run.parent / 'other'}"):
        window_of(copy_of_ntp.run)


def test_a_window_reaches_the_last_weights_from_the_checkpoint_before_them(copy_of_ntp):
    """Of a hundred steps; but it has ten steps where these are over fifty away."""
    run = copy_of_ntp.run
    line = metrics(run)[0]
    (run / "train" / "metrics.jsonl").write_text("".join(json.dumps(line | {"step": s}) + "\n" for s in range(1, 101)))
    replaced('"steps": 6', '"steps": 100')(run / "train" / "figures.json")
    checkpoints = run / "train" / "checkpoints"
    shutil.rmtree(checkpoints)

    def window(**given: int) -> tuple[int, int]:
        found = window_of(run, **given)
        return found.start, found.end

    assert window() == (0, 10)
    for step in (60, 100):
        (checkpoints / f"step-{step:08d}").mkdir(parents=True)
    assert (window(), window(start=0), window(start=0, steps=70)) == ((60, 100), (0, 10), (0, 70))
    (checkpoints / "step-00000045").mkdir()
    assert (window(), window(start=45), window(start=0)) == ((60, 100), (45, 60), (0, 45))
    shutil.rmtree(run / "train" / "model")
    shutil.rmtree(checkpoints / "step-00000100")
    assert window() == (45, 60)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train/figures.json", '{"steps": 6, "mac'),
        ("train/metrics.jsonl", '{"loss": 1.5}\n'),
        ("train/MANIFEST.json", '{"files": '),
        ("train/adopted.json", "{}"),
    ],
)
def test_a_damaged_file_is_told_with_its_path(copy_of_ntp, sftmix, name, content):
    (copy_of_ntp.run / name).write_text(content)
    found = sftmix("verify", str(copy_of_ntp.run))
    assert found.code == 4
    place = f"{copy_of_ntp.run / name}{', line 1' * name.endswith('.jsonl')}"
    assert f"{place} is not as a run writes it" in found.out + found.err


@pytest.mark.slow
def test_files_beside_the_weights_that_another_version_wrote_are_not_compared(copy_of_ntp, sftmix):
    copy_of_ntp.edit("train/model/config.json", replaced("{", '{"of_before": 1,'))
    older = replaced('"version": "', '"version": "0.')
    copy_of_ntp.edit("train/figures.json", older)
    older(copy_of_ntp.run / "summary.json")
    found = certified(sftmix, str(copy_of_ntp.run))
    assert (found.code, found.same, found.exact) == (0, True, False)
    assert any("another version of sftmix made them" in one["note"] for one in found.findings if one["same"] is None)
