"""Differences between arms by groups of examples, and what is collected of a table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.evidence.by_example import by_example
from benchmarks.evidence.collect import collect
from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json, write_json
from sftmix.common.tables import write_dynamics, write_eval, write_split
from sftmix.types import RowScores, Split, TrainingDynamics

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
