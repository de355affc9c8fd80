"""A whole table on the tiny model through the command line: what is made once, resuming, failing, and the files."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from sftmix.cli import main
from sftmix.cli.parsing import read_arguments
from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json
from sftmix.common.tables import write_eval
from sftmix.tools.compare import Comparison
from sftmix.tools.compare.cells import CellResult, flatten, refuse_unknown_metrics, result_of
from sftmix.tools.compare.command import comparison_of, table_options
from sftmix.tools.compare.markdown import markdown
from sftmix.tools.compare.statistics import Counts, interval_two_level, sign_flip
from sftmix.tools.compare.table import build_table
from sftmix.types import RowScores
from tests.conftest import Finished
from tests.forked import done as on_ranks
from tests.tiny import ROOT, metrics, status

Call = Callable[..., SimpleNamespace]
VARIANTS = {"NTP": {"objective": "NTP"}, "SFTMix": {}}
SMALL = ("--training.max_steps", "3", "--checkpoint.every", "0", "--seeds", "[1, 2]")


def words(finished: Finished, directory: Path, variants: object = VARIANTS, more: tuple[str, ...] = SMALL) -> list[str]:
    """`compare` on the tiny model into directory/table; pairs in every variant, so that all of them need the split."""
    file = directory / "variants.yaml"
    file.write_text(yaml.safe_dump({"variants": variants, "pairing": "RandomPairs"}, sort_keys=False))
    return ["compare", *finished.tiny.options, "--config", str(file), "--out", str(directory / "table"), *more]


@pytest.fixture(scope="module")
def ran(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished table; copy it before you change it."""
    directory = tmp_path_factory.mktemp("compare")
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as errors:
        assert main(words(finished, directory)) == 0
    return SimpleNamespace(out=directory / "table", printed=printed.getvalue(), errors=errors.getvalue())


CELLS = ("NTP/seed-1", "SFTMix/seed-1", "NTP/seed-2", "SFTMix/seed-2")


def test_the_reference_is_trained_once_and_the_target_in_every_run(ran: SimpleNamespace) -> None:
    adopted = {name: sorted(p.parent.name for p in (ran.out / name).glob("*/adopted.json")) for name in CELLS}
    assert adopted["NTP/seed-1"] == []
    assert adopted["SFTMix/seed-1"] == ["base", "confidence", "reference", "split"]
    assert adopted["NTP/seed-2"] == ["base", "confidence", "reference"]  # a split has a seed
    assert adopted["SFTMix/seed-2"] == adopted["SFTMix/seed-1"]
    assert [(ran.out / name / "reference" / "metrics.jsonl").exists() for name in CELLS] == [True, False, False, False]
    sources = {name: read_json(ran.out / name / "reference" / "adopted.json")["from"] for name in CELLS[1:]}
    for name, source in sources.items():
        assert (ran.out / name / "reference" / source).resolve() == (ran.out / "NTP/seed-1/reference").resolve()
    assert len({(ran.out / name / "confidence" / "dynamics.parquet").stat().st_ino for name in CELLS}) == 1
    assert [len(metrics(ran.out / name)) for name in CELLS] == [3] * 4


def test_the_table_holds_what_the_runs_say(ran: SimpleNamespace) -> None:
    table = read_json(ran.out / "table.json")
    values = {name: read_json(ran.out / name / "summary.json")["eval_nll_after"] for name in CELLS}
    assert (table["complete"], table["runs_done"], table["baseline"]) == (True, 4, "NTP")
    for variant in VARIANTS:
        own = [values[f"{variant}/seed-{seed}"] for seed in (1, 2)]
        figures = table["variants"][variant]["metrics"]["eval_nll_after"]
        assert (figures["mean"], figures["sd"]) == pytest.approx((np.mean(own), np.std(own, ddof=1)))
    off = [values[f"SFTMix/seed-{seed}"] - values[f"NTP/seed-{seed}"] for seed in (1, 2)]
    contrast = table["contrasts"][0]
    assert contrast["differences"] == pytest.approx(off)
    assert contrast["p"] == contrast["p_holm"] == sign_flip(off)
    assert "not tested" in contrast["verdict"]


def test_the_files_say_the_same_and_are_printed(ran: SimpleNamespace) -> None:
    assert {p.name for p in ran.out.iterdir()} == {
        *("table.md", "table.csv", "table.json", "cells.csv", "compare.yaml", "STATUS.json", ".lock"),
        *VARIANTS,
    }
    text = (ran.out / "table.md").read_text()
    assert text in ran.printed
    assert "INCOMPLETE" not in text
    assert (text.count("spearman_confidence_length"), ran.printed.count(" rows read: ")) == (1, 1)  # 4 cells
    assert "Nothing here is called significant: that takes 6 seeds, and these are 2." in text
    with (ran.out / "cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert max(Counter((ran.out / "cells.csv").read_text().splitlines()[0].split(",")).values()) == 1
    assert sorted(row["run"] for row in cells) == sorted(CELLS)
    with (ran.out / "table.csv").open() as file:
        rows = {(row["variant"], row["metric"]): row for row in csv.DictReader(file)}
    assert not {"seed", "world_size", "data.max_length"} & {metric for _, metric in rows}
    own = [float(row["eval_nll_after"]) for row in cells if row["variant"] == "SFTMix"]
    assert float(rows["SFTMix", "eval_nll_after"]["mean"]) == pytest.approx(np.mean(own))
    assert rows["NTP", "eval_nll_after"]["difference"] == ""
    assert status(ran.out)["exit_code"] == 0
    assert " table 4/4 (100%), SFTMix/seed-2" in ran.errors


@pytest.mark.slow
def test_the_same_command_reads_what_is_there(
    ran: SimpleNamespace, finished: Finished, sftmix: Call, tmp_path: Path
) -> None:
    shutil.copytree(ran.out, tmp_path / "table")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "table").glob("*/*/train/model/model.safetensors")}
    assert sftmix(*words(finished, tmp_path)).code == 0
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert (tmp_path / "table" / "table.md").read_text() == (ran.out / "table.md").read_text()
    changed = sftmix(*words(finished, tmp_path), "--training.learning_rate", "0.02")
    assert changed.code == 2
    assert "variant NTP, seed 1" in changed.err
    assert "training.learning_rate: 0.01 -> 0.02" in changed.err


def test_a_refused_change_leaves_the_table_and_its_configuration(
    ran: SimpleNamespace, finished: Finished, sftmix: Call, tmp_path: Path
) -> None:
    """Also one of a later variant, before which the unchanged runs are read back."""
    shutil.copytree(ran.out, tmp_path / "table")
    refused = sftmix(*words(finished, tmp_path, {**VARIANTS, "SFTMix": {"objective.mu": 0.7}}))
    assert refused.code == 2
    assert "variant SFTMix, seed 1" in refused.err
    for name in ("compare.yaml", "table.md", "table.json", "table.csv", "cells.csv"):
        assert (tmp_path / "table" / name).read_text() == (ran.out / name).read_text(), name


@pytest.mark.slow
@pytest.mark.long
def test_a_table_grows_by_variants(ran: SimpleNamespace, finished: Finished, sftmix: Call, tmp_path: Path) -> None:
    shutil.copytree(ran.out, tmp_path / "table")
    again = {
        **VARIANTS,
        "again": {},
        "control": {"splitter": "RandomSplit"},
        "alone": {**VARIANTS["NTP"], "pairing": None},
    }
    assert sftmix(*words(finished, tmp_path, again)).code == 0
    table = read_json(tmp_path / "table" / "table.json")
    assert (table["runs"], len(table["contrasts"])) == (10, 4)
    _check_orders(tmp_path / "table", table)
    assert [set(run["adopted"]) >= {"train"} for run in table["variants"]["again"]["runs"]] == [True, True]
    assert [set(run["adopted"]) for run in table["variants"]["control"]["runs"]] == [{"base"}, {"base"}]
    ours, theirs = (table["variants"][name]["metrics"]["eval_nll_after"]["mean"] for name in ("again", "SFTMix"))
    assert ours == theirs


def _check_orders(out: Path, table: dict) -> None:
    """Each contrast says whether both sides train on the same order, which the tokens of their steps show."""
    orders = {name: [step["ntp_tokens"] for step in metrics(out / name / "seed-1")] for name in table["variants"]}
    for contrast in table["contrasts"]:
        ours, theirs = (orders[contrast[side]] for side in ("ours", "theirs"))
        assert contrast["same_order"] == (ours == theirs), contrast["ours"]
        assert contrast["same_rows"] is True
    assert {c["ours"]: c["same_order"] for c in table["contrasts"]} == {
        **dict.fromkeys(("SFTMix", "again"), True),
        **dict.fromkeys(("control", "alone"), False),
    }
    text = (out / "table.md").read_text()
    assert re.search(r"^\| SFTMix − NTP +\| 2 +\| same order ", text, re.M)
    assert re.search(r"^\| alone − NTP +\| 2 +\| same rows ", text, re.M)
    assert '"same rows", the same examples in another order' in text


def test_a_wrong_variant_is_found_before_anything_starts(finished: Finished, sftmix: Call, tmp_path: Path) -> None:
    done = sftmix(*words(finished, tmp_path, {**VARIANTS, "last": {"training.epochs": -1}}))
    assert done.code == 2
    assert "variant last: training.epochs is -1" in done.err
    assert not (tmp_path / "table").exists()


def test_a_directory_of_something_else_is_left_alone(finished: Finished, sftmix: Call, tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "table.md").write_text("my notes")
    done = sftmix(*words(finished, tmp_path))
    assert (done.code, "holds table.md, which no table wrote" in done.err) == (2, True)
    assert [p.name for p in (tmp_path / "table").iterdir()] == ["table.md"]


@pytest.mark.slow
def test_a_run_that_fails_names_its_cell_and_keeps_its_exit_code(
    finished: Finished, sftmix: Call, tmp_path: Path
) -> None:
    lacking = {
        "NTP": {"objective": "NTP"},
        "late": {"data.label_field": None, "data.max_length": 100_000},  # beyond the model's context
    }
    done = sftmix(*words(finished, tmp_path, lacking))
    assert done.code in (2, 3)
    assert "error: variant late, seed 1: " in done.err
    state = status(tmp_path / "table")
    assert (state["stage"], state["exit_code"], state["step"]) == ("late/seed-1", done.code, 1)
    text = (tmp_path / "table" / "table.md").read_text()
    assert "INCOMPLETE: 1 of 4 runs are done." in text


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_table_continues(ran: SimpleNamespace, finished: Finished, sftmix: Call, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), *words(finished, tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    second = tmp_path / "table" / CELLS[1] / "train" / "inputs.json"
    deadline = time.monotonic() + 200
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = tmp_path / "table" / CELLS[0] / "train" / "model" / "model.safetensors"
    made = first.stat().st_mtime_ns
    assert not (tmp_path / "table" / CELLS[3]).exists()
    assert sftmix(*words(finished, tmp_path)).code == 0
    assert first.stat().st_mtime_ns == made
    ours, theirs = (read_json(out / "table.json")["contrasts"][0] for out in (tmp_path / "table", ran.out))
    assert ours["differences"] == theirs["differences"]


def test_examples_enter_the_interval_where_the_runs_kept_them(ran: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "table"
    shutil.copytree(ran.out, out)
    given = read_arguments(["--config", str(out / "compare.yaml"), "--out", str(out)], table_options())
    comparison = comparison_of(given)
    rng, sums = np.random.default_rng(0), {}
    for cell in comparison.cells:
        nll = rng.gamma(2, 5, 11)
        order = rng.permutation(11)  # files need not agree in their order
        scores = RowScores(nll[order], np.arange(3, 14)[order], np.ones(11, dtype=np.int64))
        write_eval(cell.path / "train" / "eval.parquet", [str(i) for i in order], scores, np.ones(11))
        sums.setdefault(cell.variant, []).append(nll)
    results = [result_of(cell, read_json(cell.path / "summary.json")) for cell in comparison.cells]
    contrast = build_table(comparison, results)["contrasts"][0]
    tokens = np.tile(np.arange(3.0, 14.0), (2, 1))
    order = np.argsort([str(i) for i in range(11)])
    ours, theirs = (Counts(np.array(sums[n])[:, order], tokens[:, order]) for n in ("SFTMix", "NTP"))
    assert contrast["interval"] == pytest.approx(interval_two_level(ours, theirs), rel=1e-12)  # sums in another order
    assert contrast["interval_over"] == "seeds and examples"
    (comparison.cells[0].path / "train" / "eval.parquet").unlink()
    contrast = build_table(comparison, results)["contrasts"][0]
    assert contrast["interval_over"] == "seeds"


def test_the_interval_is_over_the_examples_of_the_seeds_that_are_compared(ran: SimpleNamespace) -> None:
    comparison, results = results_of(ran.out)
    (lost,) = (r for r in results if (r.cell.variant, r.cell.seed) == ("SFTMix", 1))
    lost.metrics.pop("eval_nll_after")
    contrast = build_table(comparison, results)["contrasts"][0]
    files = [pq.read_table(ran.out / v / "seed-2/train/eval.parquet").sort_by("id") for v in ("SFTMix", "NTP")]
    ours, theirs = (Counts(*(f[c].to_numpy()[None].astype(float) for c in ("nll_sum", "n_tokens"))) for f in files)
    assert (contrast["seeds"], contrast["interval_over"]) == ([2], "examples")
    assert contrast["interval"] == pytest.approx(interval_two_level(ours, theirs), rel=1e-12)


def results_of(out: Path, *words: str) -> tuple[Comparison, list[CellResult]]:
    """A table that was run, with more words: its comparison and what its runs say."""
    given = read_arguments(["--config", str(out / "compare.yaml"), "--out", str(out), *words], table_options())
    comparison = comparison_of(given)
    return comparison, [result_of(cell, read_json(cell.path / "summary.json")) for cell in comparison.cells]


def test_the_brier_score_has_an_interval_over_examples(ran: SimpleNamespace) -> None:
    comparison, results = results_of(ran.out, "--metric", "calibration.brier")
    contrast = build_table(comparison, results)["contrasts"][0]
    sides = []
    for variant in ("SFTMix", "NTP"):
        files = [pq.read_table(ran.out / variant / f"seed-{seed}/train/eval.parquet").sort_by("id") for seed in (1, 2)]
        sides.append(Counts(*(np.array([f[c].to_numpy() for f in files], float) for c in ("brier_sum", "n_tokens"))))
    assert contrast["interval_over"] == "seeds and examples"
    assert contrast["interval"] == pytest.approx(interval_two_level(*sides), rel=1e-9)
    for name, side in zip(("SFTMix", "NTP"), sides, strict=True):
        own = [r.metrics["calibration.brier"] for r in results if r.cell.variant == name]
        assert side.numerator.sum(1) / side.denominator.sum(1) == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
def test_a_run_that_diverged_is_counted_and_named(ran: SimpleNamespace, value: float | None) -> None:
    comparison, results = results_of(ran.out)
    cell = next(r.cell for r in results if r.cell.name == "SFTMix/seed-2")
    broken = {**read_json(cell.path / "summary.json"), "eval_nll_after": value, "eval_accuracy": value}
    table = build_table(comparison, [result_of(cell, broken) if r.cell is cell else r for r in results])
    text = markdown(table)
    assert table["variants"]["SFTMix"]["no_value"] == [2]
    assert re.search(r"^\| SFTMix +\| 1 of 2 ", text, re.M)
    assert re.search(r"^\| NTP +\| 2 ", text, re.M)
    assert re.search(r"^\| SFTMix − NTP +\| 1 of 2 ", text, re.M)
    assert "SFTMix: no finite eval_nll_after at seed 2." in text
    assert re.search(r"^\| eval_accuracy .*\(1 of 2 seeds\)", text, re.M)
    assert np.isfinite(table["contrasts"][0]["interval"]).all()  # over the seed that both have


def test_figures_are_looked_for_in_runs_that_have_some(ran: SimpleNamespace) -> None:
    comparison, results = results_of(ran.out, "--metric", "calibration.eec")
    diverged = result_of(results[0].cell, {})
    refuse_unknown_metrics(comparison, [diverged])
    with pytest.raises(ConfigError, match=r"Did you mean calibration\.ece\?"):
        refuse_unknown_metrics(comparison, [diverged, results[1]])
    comparison, results = results_of(ran.out, "--metric", "confounds.nothing")
    refuse_unknown_metrics(comparison, [diverged, results[0]])  # NTP has no figures of the split


def test_a_contrast_that_no_run_measured_says_so(ran: SimpleNamespace) -> None:
    comparison, results = results_of(ran.out)
    broken = [result_of(r.cell, {**read_json(r.cell.path / "summary.json"), "eval_nll_after": None}) for r in results]
    assert build_table(comparison, broken)["contrasts"][0]["verdict"] == "not measured"
    assert build_table(comparison, broken[:1])["contrasts"][0]["verdict"] == "nothing to compare yet"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--metric", "calibration.eec"), ["metric names 'calibration.eec'", "Did you mean calibration.ece?"]),
        (("--metric", "eval_nll_afer"), ["metric names 'eval_nll_afer'", "Did you mean eval_nll_after?"]),
        (("--metric", "calibration"), ["metric names 'calibration'"]),  # a group cannot be tested
        (("--metrics", "[calibration,calibratoin]"), ["metrics names 'calibratoin'"]),
        (("--metrics", "[calibration.eec]"), ["metrics names 'calibration.eec'"]),
    ],
)
def test_a_misspelt_metric_is_refused_after_the_first_run(
    ran: SimpleNamespace, words: tuple[str, ...], expected: list[str]
) -> None:
    comparison, results = results_of(ran.out, *words)
    with pytest.raises(ConfigError) as error:
        refuse_unknown_metrics(comparison, results[:1])
    assert all(word in str(error.value) for word in expected)


def test_figures_of_the_split_may_be_missing_from_the_first_variant(ran: SimpleNamespace) -> None:
    comparison, results = results_of(ran.out, "--metric", "confounds.nothing", "--metrics", "[confounds, calibration]")
    refuse_unknown_metrics(comparison, results[:1])
    with pytest.raises(ConfigError, match=r"metric names 'confounds\.nothing'"):
        refuse_unknown_metrics(comparison, results[:2])
    refuse_unknown_metrics(*results_of(ran.out, "--metric", "confounds.spearman_confidence_length"))


def test_a_table_with_a_misspelt_metric_ends_at_its_first_run(
    ran: SimpleNamespace, finished: Finished, sftmix: Call, tmp_path: Path
) -> None:
    shutil.copytree(ran.out, tmp_path / "table")
    done = sftmix(*words(finished, tmp_path), "--metric", "calibration.eec")
    assert (done.code, "(1 of 4)" in done.out, "(2 of 4)" in done.out) == (2, True, False)
    assert status(tmp_path / "table") == status(ran.out)
    assert "Did you mean calibration.ece?" in done.err


@pytest.mark.slow
@pytest.mark.long
def test_the_note_on_what_seeds_share_is_true(
    ran: SimpleNamespace, finished: Finished, sftmix: Call, tmp_path: Path
) -> None:
    assert "Reference and held-out rows are the same at all seeds" in (ran.out / "table.md").read_text()
    shutil.copytree(ran.out, tmp_path / "table")
    drawn = {**VARIANTS, "drawn": {"selector": "Random", "selector.k": 20}}
    assert sftmix(*words(finished, tmp_path, drawn)).code == 0
    text = (tmp_path / "table" / "table.md").read_text()
    assert "Each seed has its own training rows (drawn) and a reference (drawn);" in text
    table = read_json(tmp_path / "table" / "table.json")
    assert [(c["ours"], c["same_rows"], c["same_order"]) for c in table["contrasts"]] == [
        ("SFTMix", True, True),
        ("drawn", False, False),
    ]
    assert '"other rows", the examples are not the same either' in text
    assert table["variants"]["drawn"]["same_at_all_seeds"] == {"data": False, "eval": True, "reference": False}
    assert table["variants"]["NTP"]["same_at_all_seeds"] == {"data": True, "eval": True, "reference": True}


def test_numbers_of_a_summary_get_dotted_names() -> None:
    summary = {"a": 1, "b": {"c": 2.5, "d": {"e": 3}}, "f": "text", "g": True, "h": None, "i": float("inf"), "j": [1]}
    assert str(dict(flatten(summary))) == str({"a": 1.0, "b.c": 2.5, "b.d.e": 3.0, "h": math.nan, "i": math.inf})


@pytest.mark.slow
@pytest.mark.long
def test_all_ranks_agree_on_what_is_adopted(finished: Finished, tmp_path: Path) -> None:
    on_ranks(words(finished, tmp_path, more=(*SMALL[:-1], "[1]")), cwd=tmp_path, ranks=2)
    table = read_json(tmp_path / "table" / "table.json")
    assert set(table["variants"]["SFTMix"]["runs"][0]["adopted"]) == {"reference", "confidence", "split", "base"}
    assert [run["run"] for variant in table["variants"].values() for run in variant["runs"]] == list(CELLS[:2])
