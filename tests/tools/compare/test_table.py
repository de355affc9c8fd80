"""The figures, contrasts and notes of a table, from results that are written down here."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sftmix.common.files import read_json, write_json
from sftmix.common.tables import read_eval, write_eval
from sftmix.components.objectives import NTP
from sftmix.config import RunConfig
from sftmix.options import ModelOptions
from sftmix.tools.compare import Comparison, TableOptions
from sftmix.tools.compare.statistics import interval, per_example
from sftmix.tools.compare.table import build_table, markdown, write_table
from sftmix.types import RowScores


def table_of(directory: Path, names: str, seeds: int, **options: Any) -> Comparison:
    """Variants of these names, whose runs have begun to train."""
    variants = {name: RunConfig(model=ModelOptions(path="m"), objective=NTP()) for name in names}
    table = TableOptions(**{"seeds": list(range(1, seeds + 1)), "metric": "x", **options})
    comparison = Comparison(out=str(directory), variants=variants, options=table)
    for cell in comparison.cells:
        write_json(cell.path / "train" / "inputs.json", {})
    return comparison


def test_numbers_of_a_summary_get_dotted_names(tmp_path):
    summary = {"a": 1, "b": {"c": {"e": 3}}, "f": "text", "h": None, "i": float("inf"), "seed": 1}
    summary |= {"data": {"max_length": 9}, "version": "0.1", "git_revision": "abc"}
    table = build_table(table_of(tmp_path, "A", 1), {"A/seed-1": summary})
    assert table["variants"]["A"]["runs"][0]["metrics"] == {"a": 1.0, "b.c.e": 3.0}
    assert table["trained_by"] == ["0.1 abc"]


def test_holm_counts_the_contrasts_that_were_planned(tmp_path):
    """Three planned, one without a value: the smallest p is multiplied by three all the same."""
    comparison = table_of(tmp_path, "ABCD", 7)
    value = {"A": 0.0, "B": 1.0, "C": 2.0}
    figures = {c.name: {"x": value[c.variant] * c.seed} if c.variant in value else {} for c in comparison.cells}
    table = build_table(comparison, figures)
    assert [c["p"] for c in table["contrasts"]] == [pytest.approx(2 / 2**7), pytest.approx(2 / 2**7), None]
    assert [c["p_holm"] for c in table["contrasts"]] == [pytest.approx(6 / 2**7), pytest.approx(6 / 2**7), None]
    none = "not tested: 0 of at least 6 seeds"
    assert [c["verdict"] for c in table["contrasts"]] == ["different", "different", none]


def test_a_part_of_the_seeds_gives_no_contrast(tmp_path):
    comparison = table_of(tmp_path, "AB", 8)
    figures = {c.name: {"x": (c.variant == "B") * (1.0 + c.seed)} for c in comparison.cells}
    whole, part = (build_table(comparison, dict([*figures.items()][:n])) for n in (16, 14))
    assert "INCOMPLETE: 14 of 16 runs are done." in markdown(part)
    assert part["contrasts"] == []
    assert "INCOMPLETE" not in markdown(whole)
    (contrast,) = whole["contrasts"]
    assert (contrast["verdict"], contrast["p"], contrast["interval_over"]) == ("different", 2 / 2**8, "seeds")
    assert contrast["interval"] == pytest.approx(tuple(stats.ttest_1samp(range(2, 10), 0).confidence_interval()))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, []),
        ({"objective": {"class_path": "SFTMix", "init_args": {"mu": 2}}}, ["objective.mu"]),
        ({"pairing": {"class_path": "AnyPairs"}, "split": "another"}, ["pairing", "split"]),
    ],
)
def test_the_inputs_in_which_trainings_differ_are_named(tmp_path, changed, named):
    """At any seed, on either side; none: one training, which the other adopts."""
    objective = {"class_path": "SFTMix", "init_args": {"mu": 1}}
    inputs = {"split": "s", "pairing": {"class_path": "RandomPairs"}, "objective": objective}
    comparison = table_of(tmp_path, "ABC", 2)
    for cell in comparison.cells:
        own = {**inputs, "seed": cell.seed, "training": {"epochs": 3.0, "learning_rate": 1}}
        write_json(cell.path / "train" / "inputs.json", {**own, **(changed if cell.name == "B/seed-2" else {})})
    table = build_table(comparison, {cell.name: {"x": 1.0} for cell in comparison.cells})
    assert [c["inputs_that_differ"] for c in table["contrasts"]] == [named, []]
    assert re.search(rf"^\| B − A .* \| {', '.join(named) or 'none'} *\|$", markdown(table), re.M)


@pytest.mark.parametrize("value", [None, float("inf")])
def test_a_run_that_diverged_is_counted_and_named(tmp_path, value):
    comparison = table_of(tmp_path, "AB", 3, metrics=["y"])
    figures: dict[str, Any] = {c.name: {"x": float(c.seed), "y": {"z": 2.0}} for c in comparison.cells}
    figures["B/seed-2"] = {"x": value, "y": {"z": value}}
    table = build_table(comparison, figures)
    assert (table["variants"]["B"]["no_value"], table["contrasts"][0]["seeds"]) == ([2], [1, 3])
    assert table["variants"]["B"]["metrics"]["x"] == {"seeds": 2, "mean": 2.0, "sd": pytest.approx(np.sqrt(2))}
    text = markdown(table)
    assert re.search(r"^\| B − A +\| 2 of 3 ", text, re.M)
    assert "B: no finite x at seeds 2." in text
    assert re.search(r"^\| y\.z +\| 2 ± 0 +\| 2 ± 0 \(2 of 3 seeds\) +\|$", text, re.M)


def test_examples_enter_the_interval_where_the_runs_kept_them(tmp_path):
    """Of the seeds that have the metric on both sides; files need not agree in their order."""
    rng, sums, tokens = np.random.default_rng(0), {}, np.arange(3, 14)
    comparison = table_of(tmp_path, "AB", 3, metric="eval_nll_after")
    for cell in comparison.cells:
        sums[cell.name], order = rng.gamma(2, 5, 11), rng.permutation(11)
        scores = RowScores(sums[cell.name][order], tokens[order], np.ones(11, dtype=np.int64))
        write_eval(cell.path / "train" / "eval.parquet", [f"{i:02}" for i in order], scores, np.zeros(11))
    figures = {name: {"eval_nll_after": own.sum() / tokens.sum()} for name, own in sums.items()}
    for seeds, over in (([1, 2, 3], "seeds and examples"), ([1, 3], "seeds and examples"), ([2], "examples")):
        known = {name: own if int(name[-1]) in seeds else {} for name, own in figures.items()}
        (contrast,) = build_table(comparison, known)["contrasts"]
        count = np.tile(tokens.astype(float), (len(seeds), 1))
        ours, theirs = (per_example(np.array([sums[f"{v}/seed-{s}"] for s in seeds]), count) for v in "BA")
        assert contrast["interval"] == pytest.approx(interval(ours - theirs), rel=1e-12)
        assert contrast["interval_over"] == over
    file = comparison.cells[0].path / "train" / "eval.parquet"
    ids, scores, _ = read_eval(file)
    for others in (lambda: write_eval(file, ["other", *ids[1:]], scores), file.unlink):  # another row, or no rows
        others()
        (contrast,) = build_table(comparison, figures)["contrasts"]
        assert contrast["interval_over"] == "seeds"


def test_the_files_say_the_same(tmp_path):
    comparison = table_of(tmp_path, "AB", 2)
    figures = {cell.name: {"x": cell.seed / 3, "only": 7.0} for cell in comparison.cells}
    del figures["A/seed-2"]["only"]
    table = write_table(tmp_path, build_table(comparison, figures))
    assert read_json(tmp_path / "table.json") == json.loads(json.dumps(table))
    assert (tmp_path / "table.md").read_text() == markdown(table)
    rows = (tmp_path / "cells.csv").read_text().splitlines()
    assert rows[::2] == ["variant,seed,run,x,only", f"A,2,A/seed-2,{2 / 3},", f"B,2,B/seed-2,{2 / 3},7.0"]
