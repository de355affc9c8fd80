"""summary.json of a finished run against what its artefacts and its model say (design: a run directory)."""

import json
import subprocess

import pandas as pd
import pytest

import sftmix
from tests.tiny import ROOT, metrics


@pytest.fixture(scope="module")
def summary(finished) -> dict:
    return json.loads((finished.path / "summary.json").read_text())


def test_token_counts_and_mu_are_those_of_the_steps(finished, summary):
    steps = metrics(finished.path)
    for name in ("ntp_tokens", "mixup_tokens"):
        assert summary[name] == sum(m[name] for m in steps) > 0
    assert summary["mu_effective"] == pytest.approx(0.2 * summary["ntp_tokens"] / summary["mixup_tokens"])
    assert summary["stages"]["train"]["tokens"] == sum(m["tokens"] for m in steps)


def test_confidence_of_the_groups_is_that_of_the_tables(finished, summary):
    confidence, split = (
        pd.read_parquet(finished.path / stage / f"{stage}.parquet").set_index("id") for stage in ("confidence", "split")
    )
    for name in ("confident", "unconfident"):
        values, group = confidence.confidence[split.group == name].to_numpy(), summary["confidence"][name]
        assert group["examples"] == len(values) == 14
        assert group["confidence_mean"] == pytest.approx(values.mean())
        assert group["confidence_std"] == pytest.approx(values.std())
        assert group["confidence_median"] == pytest.approx(sum(sorted(values)[6:8]) / 2)  # of 14
    assert summary["confidence"]["unpaired"]["examples"] == 1


def test_the_revision_is_that_of_the_checkout(summary):
    if not (ROOT / ".git").exists():
        assert summary["git_revision"] is None
        return
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12"]
    revision = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    assert len(revision) >= 7
    assert summary["git_revision"].removesuffix("+") == revision


def test_stages_tell_time_tokens_and_memory(summary):
    assert set(summary["stages"]) == {"reference", "confidence", "split", "train", "baseline", "base"}
    for name in ("reference", "train", "baseline"):
        stage = summary["stages"][name]
        assert 0 < stage["elapsed"] <= stage["wall_seconds"] < 600
        assert (stage["tokens"] > 0, stage["skipped"]) == (True, 0)
    assert all(stage["peak_memory_bytes"] > 1e6 for stage in summary["stages"].values())
    assert (summary["version"], summary["seed"], summary["world_size"]) == (sftmix.__version__, 42, 1)
    assert summary["remarks"] == []
