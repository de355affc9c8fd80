"""Rows whose truth is known: how they are made, what is kept of the runs on them, and the tests of the plan."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.evidence.known_figures import aucs, by_truth
from benchmarks.evidence.known_rows import corrupted, named
from benchmarks.evidence.known_tests import contrasts
from benchmarks.evidence.known_truth import ARMS, keep
from sftmix.cli.parsing import read_arguments
from sftmix.disk.files import read_json, write_json
from sftmix.disk.tables import write_eval, write_table
from sftmix.tools.compare.command import CompareOptions, comparison_of
from sftmix.tools.compare.plan import DIVERGED
from sftmix.tools.quickstart import make_rows, write_jsonl
from sftmix.types import RowLosses
from tests.tiny import ROOT

TABLES = sorted((ROOT / "benchmarks" / "evidence" / "known-truth").glob("corrupted-*.yaml"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return named(make_rows(n=800, seed=3), "train")


# ---------------------------------------------------------------------------------------- rows and figures


def test_corrupted_rows_have_a_wrong_response_of_their_family_at_larger_shares_too(rows):
    few, many = (corrupted(rows, share, seed=1) for share in (10, 40))
    assert corrupted(rows, 0, seed=1) == rows
    assert corrupted(rows, 10, seed=2) != few
    for share, made in ((10, few), (40, many)):
        wrong = [k for k, row in enumerate(made) if row["truth"] == "corrupted"]
        assert len(wrong) == pytest.approx(400 * share / 100, abs=4)
        for k, (row, before) in enumerate(zip(made, rows, strict=True)):
            family = {other["output"] for other in rows if other["family"] == row["family"]} - {before["output"]}
            assert (row["output"] in family and before["truth"] == "clean") if k in wrong else row == before
            assert row == before | {"output": row["output"], "truth": row["truth"]}
    assert all(row == other for row, other in zip(few, many, strict=True) if row["truth"] == "corrupted")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_plan(path):
    made = comparison_of(read_arguments(["--config", str(path), "--out", "o"], CompareOptions))
    made.validate()
    assert (list(made.variants), made.options.seeds) == (["NTP", "SFTMix", "RandomSplit"], list(range(1, 11)))
    assert made.options.fresh_reference
    share = path.stem.removeprefix("corrupted-")
    assert all(c.data.train[0].endswith(f"train-{share}.jsonl") for c in made.variants.values())
    assert {(c.objective.mu, c.training.epochs) for n, c in made.variants.items() if n != "NTP"} == {(0.2, 6)}
    orders = [str(c.as_dict()["pairing"]) for c in made.variants.values()]
    assert "RandomPairs" in orders[0]  # NTP trains in the order of pairs, as SFTMix does


def test_auc_is_the_share_of_pairs_in_the_right_order():
    truths = [("a", "clean"), ("a", "corrupted"), ("a", "clean"), ("b", "clean"), ("b", "corrupted"), ("c", "open")]
    train = {str(k): {"family": family, "truth": truth} for k, (family, truth) in enumerate(truths)}
    confidence = dict(zip("012345", [-1.0, -2.0, -3.0, -2.5, -2.5, -0.5], strict=True))
    found = aucs(confidence, train)
    assert found["within_families"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["deterministic"] == pytest.approx((1 + 0 + 0 + 1 + 0 + 0.5) / 6)
    assert found["all"] == pytest.approx((2.5 + 2) / 8)
    assert aucs(confidence, {"0": train["0"]}) == {}


def test_losses_by_truth_are_over_tokens():
    train = {str(k): {"truth": truth} for k, truth in enumerate(["clean", "clean", "corrupted"])}
    assert by_truth({"0": (1.0, 3), "1": (2.0, 1), "2": (4.0, 2)}, train) == {"clean": 1.25, "corrupted": 4.0}


def test_contrasts_are_paired_by_seed_with_holm_over_the_planned_shares():
    """At the seeds that both arms have, in their order."""

    def with_gap(gap: float) -> dict:
        return {"gap": gap, "train_nll": {"corrupted": 1 + gap, "clean": 1.0}, "exact": {"deterministic": 0.9}}

    seeds = [str(seed) for seed in range(1, 11)]
    runs = {"NTP": {s: with_gap(0.5) for s in seeds}, "SFTMix": {s: with_gap(0.7 + int(s) / 100) for s in seeds}}
    few = {
        "NTP": {s: with_gap(float(s)) for s in ("3", "10", "2")},
        "SFTMix": {s: with_gap(1.5 * int(s)) for s in seeds[1:]},
    }
    auc = {s: {"deterministic": 0.9, "within_families": 0.8, "all": 0.7} for s in seeds}
    tables = {0: {"auc": {}, "runs": runs}, 20: {"auc": auc, "runs": runs}}
    made, some = contrasts(tables), contrasts({40: {"auc": {}, "runs": few}})
    gap, parts = made["gap"]["SFTMix - NTP"], made["parts"]["SFTMix - NTP"]["20"]
    assert list(gap) == ["20"]
    assert gap["20"]["mean"] == parts["corrupted"]["mean"] == pytest.approx(0.255)
    assert (gap["20"]["p"], gap["20"]["p_holm"]) == (2 / 1024, 3 * 2 / 1024)  # three shares were planned
    assert made["exact"]["SFTMix - NTP"]["0"]["p_holm"] == 1.0
    assert parts["clean"]["interval"] == (0.0, 0.0)
    assert made["auc"]["20"]["deterministic"]["mean"] == pytest.approx(0.9)
    assert some["gap"]["SFTMix - NTP"]["40"]["seeds"] == [2, 3, 10]
    assert some["gap"]["SFTMix - NTP"]["40"]["differences"] == [1.0, 1.5, 5.0]
    assert some["gap"]["SFTMix - RandomSplit"] == some["auc"] == {}


# ---------------------------------------------------------------------------------------- tables

FAMILIES = {"train-20": ["count", "count", "kinds", "kinds", "pick"], "eval": ["count", "kinds", "kinds", "pick"]}
TRUTHS = ["clean", "corrupted", "clean", "corrupted", "open"]


def write_run(table: Path, arm: str, seed: int, *, clean: float = 1.0) -> None:
    """Write what is read of a finished run: NLL of clean rows as given, of the others 2 and 3 nats per token."""
    run, ids = table / arm / f"seed-{seed}", [f"train-20-{k}" for k in range(5)]
    losses = [{"clean": clean, "corrupted": 2.0, "open": 3.0}[truth] for truth in TRUTHS]
    columns = {"id": ids, "held_out": [False] * 5, "response_tokens": [1] * 5, "loss_after": losses}
    write_json(run / "train" / "MANIFEST.json", {})
    (run / "report").mkdir(parents=True)
    pq.write_table(pa.table(columns), run / "report" / "examples.parquet")
    write_table(run / "confidence" / "confidence.parquet", ids, confidence=np.array([-1.0, -2, -1, -2, -3]))
    scores = RowLosses(np.ones(4), np.array([2, 2, 2, 2]), np.array([2, 2, 1, 0]))
    write_eval(run / "train" / "eval.parquet", [f"eval-{k}" for k in range(4)], scores)
    write_json(run / "summary.json", {"eval_nll_after": 0.5, "eval_nll_best": 0.4})


@pytest.fixture
def tables(tmp_path) -> Iterator[Path]:
    """A folder of tables with its rows, and the table at 20% without any run."""
    kinds = {"count": "deterministic", "kinds": "deterministic", "pick": "open"}
    for name, families in FAMILIES.items():
        rows = [
            {"id": f"{name}-{k}", "family": family, "kind": kinds[family], "truth": truth}
            for k, (family, truth) in enumerate(zip(families, TRUTHS, strict=False))
        ]
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    (tmp_path / "corrupted-20").mkdir()
    return tmp_path


def write_runs(table: Path, seeds: range, **clean: float) -> None:
    for arm in ARMS:
        for seed in seeds:
            write_run(table, arm, seed, clean=clean.get(arm, 1.0))


def test_a_table_is_tested_when_all_planned_runs_are_over(tables, tmp_path):
    table, out = tables / "corrupted-20", tmp_path / "out"
    write_runs(table, range(1, 10))
    write_run(table, "NTP", 99)  # a seed of no plan
    assert not keep(tables, out)[20]["complete"]
    assert read_json(out / "contrasts.json")["gap"]["SFTMix - NTP"] == {}
    write_runs(table, range(10, 11), SFTMix=1.25)
    kept = keep(tables, out)[20]
    assert kept["complete"]
    assert list(kept["runs"]["NTP"]) == list(kept["auc"]) == [str(seed) for seed in range(1, 11)]
    run = kept["runs"]["SFTMix"]["10"]
    assert (run["gap"], run["exact"], run["exact_by_family"]["kinds"]) == (
        0.75,
        {"deterministic": pytest.approx(2 / 3), "open": 0.0},
        0.5,
    )
    found = read_json(out / "contrasts.json")
    assert found["gap"]["SFTMix - NTP"]["20"]["differences"] == [0.0] * 9 + [-0.25]


def test_a_run_that_diverged_is_over_and_its_seed_missing_from_the_contrasts(tables, tmp_path):
    table, out = tables / "corrupted-20", tmp_path / "out"
    write_runs(table, range(1, 11))
    lost = table / "SFTMix" / "seed-3"
    shutil.rmtree(lost / "train")
    write_json(lost / DIVERGED, {})
    kept = keep(tables, out)[20]
    assert (kept["complete"], kept["diverged"], len(kept["auc"])) == (True, {"SFTMix": [3]}, 10)
    gap = read_json(out / "contrasts.json")["gap"]["SFTMix - NTP"]["20"]
    assert gap["seeds"] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
