"""Rows whose truth is known, and what is read of runs on them."""

from __future__ import annotations

import pytest

from benchmarks.evidence.known_rows import corrupted, named
from benchmarks.evidence.known_truth import aucs, by_truth, contrasts
from sftmix.cli.arguments import sort_arguments
from sftmix.cli.compare import comparison_of
from sftmix.compare import TableOptions
from sftmix.quickstart import make_rows
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
