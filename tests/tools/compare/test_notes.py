"""What a table says beside its figures: inputs that differ, and runs that diverged, were cut short or taken over.

And how many decimals its figures have.
"""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sftmix.components import Quantile, RandomPairs
from sftmix.disk.files import write_json
from sftmix.tools.compare.table import build_table
from sftmix.tools.compare.written import latex, markdown
from tests.tools.compare.tables import configured, table_of


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


def test_options_of_two_names_that_the_stages_recorded_alike_do_not_differ(tmp_path):
    """`auto` and the pairing that it is, a length and null, files of the same rows, a splitter that is not used."""
    comparison = table_of(tmp_path, "AB", 2)
    one = comparison.variants["A"]
    data = replace(one.data, max_length=128, cache_dir="elsewhere", train=["same.json"])
    training = replace(one.training, precision="fp32")
    other = replace(one, pairing="auto", data=data, training=training, splitter=Quantile(levels=3))
    comparison.variants = {"A": replace(one, pairing=RandomPairs()), "B": other}
    recorded = {"pairing": {"class_path": "RandomPairs"}, "split": None, "data": {"max_length": 128}}
    for cell in comparison.cells:
        write_json(cell.path / "train" / "inputs.json", recorded)
    table = build_table(comparison, {cell.name: {"x": 1.0} for cell in comparison.cells})
    assert table["contrasts"][0]["inputs_that_differ"] == []
    assert table["variants"]["B"]["options"]["pairing"] == "auto"


def test_options_that_decide_no_weights_are_named(tmp_path):
    """The best of more evaluations is lower; and a run that is read back says nothing of its own layout's speed."""
    comparison = table_of(tmp_path, "AB", 2)
    often = replace(comparison.variants["B"].training, micro_batch_size=2)
    changed = replace(
        comparison, variants={**comparison.variants, "B": replace(comparison.variants["B"], training=often)}
    )
    going_on = build_table(changed, {cell.name: {"x": 1.0} for cell in comparison.cells})
    assert going_on["contrasts"][0]["inputs_that_differ"] == [], "the runs were made with others"
    comparison = changed
    configured(comparison)
    write_json(tmp_path / "B" / "seed-2" / "train" / "adopted.json", {"from": "../../../A/seed-2/train"})
    table = build_table(comparison, {cell.name: {"x": 1.0} for cell in comparison.cells})
    assert table["contrasts"][0]["inputs_that_differ"] == ["training.micro_batch_size"]
    assert [run["trained_in"] for run in table["variants"]["B"]["runs"]] == ["B/seed-1", "A/seed-2"]
    assert re.search(r"^\*\*B: .* A/seed-2, .* seconds and memory", markdown(table), re.M)


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


def test_steps_that_were_skipped_or_not_made_are_said_with_their_seeds(tmp_path):
    """Such a seed counts in means and contrasts all the same; a reference is named, and nothing of a whole training."""
    comparison, figures = table_of(tmp_path, "ABC", 3), {}
    made = {"skipped": 0.0, "steps": 3, "total_steps": 3}
    for cell in comparison.cells:
        figures[cell.name] = {"x": 1.0, "stages": {"reference": made, "train": made, "split": {"wall_seconds": 1.0}}}
    figures["B/seed-2"]["stages"] = {"train": {**made, "skipped": 2.0}}
    figures["B/seed-3"]["stages"] = {
        "train": {**made, "steps": 1, "skipped": 1.0},
        "reference": {**made, "skipped": 1.0},
    }
    figures["C/seed-1"] = {}
    text = markdown(build_table(comparison, figures))
    assert "**B, seed 2: 2 of 3 steps of train were skipped, since their gradients were not finite.**" in text
    assert "**B, seed 3: 1 of 3 steps of reference were skipped, since their gradients were not finite.**" in text
    assert "**B, seed 3: 1 of 1 steps of train were skipped, since their gradients were not finite.**" in text
    assert "**B, seed 3: train was stopped after step 1 of 3.**" in text
    assert text.count("skipped") == 3


@pytest.mark.parametrize(
    ("metric", "unit"),
    [
        ("eval_nll_as_trained", " eval_nll_as_trained: nats per response token of the held-out rows; lower is better."),
        ("calibration.nll", " calibration.nll: nats per response token of the held-out rows; lower is better."),
        ("stages.train.wall_seconds", ""),
    ],
)
def test_the_unit_of_a_metric_is_said_where_its_name_does_not(tmp_path, metric, unit):
    table = build_table(table_of(tmp_path, "AB", 1, metric=metric), {})
    assert f"\n\nMean ± standard deviation over seeds.{unit}\n\n" in markdown(table)


def test_the_notes_are_comments_of_the_latex(tmp_path):
    """No note of contrasts, which that table has not; each in a line of its own, before the table."""
    comparison = table_of(tmp_path, "AB", 2)
    figures = {cell.name: {"x": 1.0} for cell in comparison.cells}
    figures["B/seed-2"] = {}
    lines = latex(build_table(comparison, figures)).splitlines()
    assert lines[0].startswith("% B: no finite x at seeds 2. Such runs (diverged, or not measured) are in no mean")
    assert lines[1:3] == ["% Mean ± standard deviation over seeds.", r"\begin{tabular}{lr}"]
    del figures["B/seed-1"]
    assert latex(build_table(comparison, figures)).startswith("% INCOMPLETE: 3 of 4 runs are done.\n")


def test_a_name_of_metrics_that_no_run_has_is_said(tmp_path):
    comparison = table_of(tmp_path, "AB", 3, metrics=["eval_acuracy", "y", "other"])
    figures = {cell.name: {"x": 1.0, "y": {"z": 2.0}, "eval_accuracy": 0.5} for cell in comparison.cells}
    text = markdown(build_table(comparison, figures))
    assert "**metrics: no run has 'eval_acuracy'. Did you mean eval_accuracy? The names are fit and" in text
    assert "**metrics: no run has 'other'; the names are fit and those of summary.json.**" in text
    assert text.count("metrics: no run has") == 2
    without = table_of(tmp_path, "AB", 3)
    assert "no run has" not in markdown(build_table(without, figures))


def test_a_difference_that_four_decimals_do_not_show_has_more(tmp_path):
    """Two digits of the spread of the differences, in the values too; a difference that never varies has four."""
    small = np.array([3.1, 2.2, 4.0, 2.9, 3.3, 2.0, 2.7]) * 1e-5
    comparison = table_of(tmp_path, "ABC", 7)
    shift = {"A": np.zeros(7), "B": -small, "C": np.full(7, 0.25)}
    figures = {c.name: {"x": 2.0 + c.seed / 8 + shift[c.variant][c.seed - 1]} for c in comparison.cells}
    text = markdown(build_table(comparison, figures))
    half = stats.t.ppf(0.975, 6) * small.std(ddof=1) / np.sqrt(7)
    low, mean, high = (f"{-small.mean() + sign * half:+.7f}" for sign in (-1, 0, 1))
    assert (mean, f"{small.std(ddof=1):.7f}") == ("-0.0000289", "0.0000068")
    assert re.search(rf"^\| B − A +\| 7 of 7 \| {mean} +\| \[{low}, {high}\] .* \| different ", text, re.M)
    assert re.search(r"^\| C − A +\| 7 of 7 \| \+0\.2500 +\| \[\+0\.2500, \+0\.2500\]", text, re.M)
    assert re.search(r"^\| 1 +\| 2\.1250000 \| 2\.1249690 \| 2\.3750000 \|$", text, re.M)
    one = table_of(tmp_path / "one", "AB", 1)
    assert "| 1 of 1 | -0.000030 " in markdown(build_table(one, {"A/seed-1": {"x": 2.0}, "B/seed-1": {"x": 1.99997}}))
