"""Rows whose truth is known, what is read of runs on them, and differences by groups of examples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.evidence.by_example import by_example
from benchmarks.evidence.collect import collect
from benchmarks.evidence.known_rows import corrupted, named
from benchmarks.evidence.known_truth import aucs, by_truth, contrasts
from sftmix.cli.arguments import sort_arguments
from sftmix.cli.compare import comparison_of
from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json, write_json
from sftmix.common.tables import write_dynamics, write_eval, write_split
from sftmix.compare import TableOptions
from sftmix.quickstart import make_rows
from sftmix.types import RowScores, Split, TrainingDynamics
from tests.tiny import ROOT

TABLES = sorted((ROOT / "benchmarks" / "evidence" / "known-truth").glob("corrupted-*.yaml"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return named(make_rows(n=800, seed=3), "train")


# ------------------------------------------------------------------------------------------ known truth


@pytest.mark.parametrize("share", [10, 40])
def test_corrupted_rows_have_a_wrong_response_of_their_family(rows, share):
    found = corrupted(rows, share, seed=1)
    wrong = [k for k, row in enumerate(found) if row["truth"] == "corrupted"]
    assert len(wrong) == pytest.approx(400 * share / 100, abs=4)
    for k, (row, before) in enumerate(zip(found, rows, strict=True)):
        if k not in wrong:
            assert row == before
            continue
        assert before["truth"] == "clean"
        assert row["output"] != before["output"]
        assert row["output"] in {other["output"] for other in rows if other["family"] == row["family"]}
        assert row == before | {"output": row["output"], "truth": "corrupted"}


def test_a_larger_share_holds_the_corrupted_rows_of_a_smaller_one(rows):
    few, many = (corrupted(rows, share, seed=1) for share in (10, 40))
    assert all(row == other for row, other in zip(few, many, strict=True) if row["truth"] == "corrupted")
    assert corrupted(rows, 0, seed=1) == rows
    assert corrupted(rows, 10, seed=2) != few


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_plan(path):
    made = comparison_of(sort_arguments(["--config", str(path), "--out", "o"], list(vars(TableOptions()))))
    made.validate()
    assert (list(made.variants), made.options.seeds) == (["NTP", "SFTMix", "RandomSplit"], list(range(1, 11)))
    assert made.options.fresh_reference
    share = path.stem.removeprefix("corrupted-")
    assert all(c.data.train[0].endswith(f"train-{share}.jsonl") for c in made.variants.values())
    assert {(c.objective.mu, c.training.epochs) for n, c in made.variants.items() if n != "NTP"} == {(0.2, 6)}
    orders = [str(c.plain()["pairing"]) for c in made.variants.values()]
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
    def run(gap: float, exact: float) -> dict:
        return {"gap": gap, "exact": {"deterministic": exact}}

    seeds = [str(seed) for seed in range(1, 11)]
    arms = {"NTP": (0.5, 0.9), "SFTMix": (0.7, 0.9), "RandomSplit": (0.8, 0.9)}
    runs = {
        arm: {s: run(gap + int(s) / 100 * (arm == "SFTMix"), exact) for s in seeds}
        for arm, (gap, exact) in arms.items()
    }
    auc = {s: {"deterministic": 0.9, "within_families": 0.8, "all": 0.7} for s in seeds}
    found = contrasts({0: {"auc": {}, "runs": runs}, 20: {"auc": auc, "runs": runs}})
    gap = found["gap"]["SFTMix - NTP"]["20"]
    assert gap["mean"] == pytest.approx(0.255)
    assert (gap["p"], gap["p_holm"]) == (2 / 1024, 3 * 2 / 1024)  # three shares were planned
    assert list(found["gap"]["SFTMix - NTP"]) == ["20"]
    assert found["exact"]["SFTMix - NTP"]["0"]["p_holm"] == 1.0
    assert found["auc"]["20"]["deterministic"]["mean"] == pytest.approx(0.9)


# ------------------------------------------------------------------------------------------- by example


IDS = list("abcdefgh")
TOKENS = np.array([1, 2, 3, 4, 5, 6, 7, 8])


def stage(path: Path, nll: np.ndarray) -> None:
    """Write what is read of a stage, the same rows as held-out and as training ones."""
    zeros = np.zeros(8, dtype=np.int64)
    write_eval(path / "eval.parquet", IDS, RowScores(nll, TOKENS, zeros), np.zeros(8))
    sample = TrainingDynamics(IDS[::-1], np.array([3]), nll[::-1, None], TOKENS[::-1], zeros[:, None])
    write_dynamics(path / "sample.parquet", sample)
    write_json(path / "MANIFEST.json", {})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Three seeds; at seed s SFTMix is lower by s nats in the rows c, f and g, of topic x, and equal elsewhere."""
    nll = TOKENS * np.array([5.0, 1, 4, 2, 8, 3, 7, 6])  # the most confident: b, d, then f, c
    for seed in (1, 2, 3):
        for arm in ("NTP", "SFTMix"):
            run = tmp_path / arm / f"seed-{seed}"
            off = np.isin(IDS, ["c", "f", "g"]) * seed * (arm == "SFTMix")
            stage(run / "train", 10 * TOKENS - off)
            stage(run / "base", nll)
        run = tmp_path / "SFTMix" / f"seed-{seed}"
        halves = Split(group=np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=np.int8), names=("confident", "unconfident"))
        write_split(run / "split" / "split.parquet", IDS, halves)
        (run / "report").mkdir()
        pq.write_table(pa.table({"id": IDS, "topic": list("yyxyyxxy")}), run / "report" / "examples.parquet")
    return tmp_path


def test_differences_are_over_the_tokens_of_a_group_and_paired_by_seed(table):
    found = by_example(table, "SFTMix", "NTP", "topic")
    by = {(g["rows"], g["by"], g["group"]): g for g in found["groups"]}
    assert found["seeds"] == [1, 2, 3]
    for rows in ("held-out", "training sample"):
        means = {key[1:]: g["mean"] for key, g in by.items() if key[0] == rows}
        assert means["confidence of the base model", "most confident"] == 0
        assert means["confidence of the base model", "second quarter"] == pytest.approx(0)
        assert means["confidence of the base model", "third quarter"] == pytest.approx(-2 * 2 / 9)
        assert means["confidence of the base model", "least confident"] == pytest.approx(-2 / 12)
        assert means["response length", "shortest"] == 0
        assert means["response length", "second quarter"] == pytest.approx(-2 / 7)
        assert means["topic", "x"] == pytest.approx(-6 / 16)
    half = by["training sample", "half of the split", "unconfident"]
    assert half["differences"] == pytest.approx([-2 * s / 26 for s in (1, 2, 3)])
    assert (half["examples"], half["p"]) == (4, 0.25)
    assert half["p_holm"] == 1.0
    assert ("held-out", "half of the split", "confident") not in by
    assert found["exploratory"] is True


def test_a_table_without_a_common_seed_and_a_category_that_is_not_there_are_refused(table):
    with pytest.raises(ConfigError, match="no seed that both"):
        by_example(table, "SFTMix", "other")
    with pytest.raises(ConfigError, match=r"--category is colour; .*topic"):
        by_example(table, "SFTMix", "NTP", "colour")


# --------------------------------------------------------------------------------------------- collecting


def test_a_run_that_diverged_is_kept_as_such_and_runs_of_other_tables_are_not(tmp_path):
    made, out = tmp_path / "table", tmp_path / "out"
    about = {"seed": 0, "versions": {}, "trained_by": [], "contrasts": [{"p": 0.01}]}
    variants = {arm: {"options": {}, "runs": []} for arm in ("NTP", "SFTMix")}
    write_json(made / "table.json", {"variants": variants, "options": {"seeds": [1, 2]}, **about})
    for run in ("NTP/seed-1", "NTP/seed-3", "other/seed-1"):
        stage(made / run / "train", TOKENS * 2.0)
        write_json(made / run / "summary.json", {"eval_nll_after": 2.0, "data": {"rows": 8}})
    write_json(made / "SFTMix" / "seed-1" / "diverged.json", {"message": "not finite"})
    write_json(made / "SFTMix" / "seed-2" / "STATUS.json", {"exit_code": 6, "stage": "reference"})
    assert collect(made, out, halves="SFTMix") == 1
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["NTP-seed-1.json", "SFTMix-seed-1.json"]
    assert read_json(out / "runs" / "SFTMix-seed-1.json") == {"seed": 1, "exit_code": 6}
    assert "contrasts" not in read_json(out / "table.json")  # no test of a table that may be unfinished
    kept = json.loads((out / "runs" / "NTP-seed-1.json").read_text())
    assert (kept["eval_nll_after"], "data" in kept) == (2.0, False)
