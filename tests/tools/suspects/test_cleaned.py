"""The last command of docs/clean.md: rows as they are against the cleaned ones, trained for as many steps."""

import pandas as pd
import pytest

from sftmix.disk.files import read_json
from tests.tiny import metrics


@pytest.mark.long
@pytest.mark.slow
def test_rows_that_are_cleaned_are_compared_with_those_that_are_not(tiny, sftmix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = sftmix("suspects", str(tiny.train), "--embedding", "tfidf", "--drop", "9", "--out", "suspects")
    assert found.code == 0, found.err
    words = ["--config", "recipe:cleaned", *tiny.bare, "--out", "table", "--seeds", "[1, 2]"]
    words += ["--training.max_steps", "3", "--data.max_length", "128"]
    done = sftmix("compare", *words)
    assert done.code == 0, done.err
    dropped = pd.read_csv("suspects/suspects.csv").query("decision == 'drop'")["id"]
    assert len(dropped) == 9
    for seed in (1, 2):
        runs = {name: tmp_path / "table" / name / f"seed-{seed}" for name in ("as-they-are", "cleaned")}
        assert {name: len(metrics(run)) for name, run in runs.items()} == {"as-they-are": 3, "cleaned": 3}
        ids = {name: {*pd.read_parquet(run / "train" / "sample.parquet")["id"]} for name, run in runs.items()}
        assert not ids["cleaned"] & {*dropped}
        assert {name: read_json(run / "summary.json")["data"]["train"] for name, run in runs.items()} == {
            "as-they-are": 29,
            "cleaned": 20,
        }
    (contrast,) = read_json(tmp_path / "table" / "table.json")["contrasts"]
    assert (contrast["ours"], contrast["theirs"], contrast["seeds"]) == ("cleaned", "as-they-are", [1, 2])
    assert all(name.startswith("data.") for name in contrast["inputs_that_differ"])
