"""Hub ids and their splits: what counts as one, and what is said where it cannot be loaded."""

from __future__ import annotations

import datasets
import pytest

from sftmix.common.errors import DataError
from sftmix.data.sources import HUB_ID, Source, expand


@pytest.mark.parametrize("name", ["tatsu-lab/alpaca", "HuggingFaceH4/ultrachat_200k", "squad", "a.b/c-d_e.f"])
def test_hub_ids(name: str) -> None:
    assert HUB_ID.match(name)


@pytest.mark.parametrize("name", ["a/b/c", "/a/b", "./a", "../a", "a/", "a/..", "", "a b/c", "a@b", "~/rows"])
def test_what_is_no_hub_id(name: str) -> None:
    assert not HUB_ID.match(name)


@pytest.mark.parametrize("name", ["no-such/set@train_sft", "no-such/set@train[:50%]", "no-such/set"])
def test_a_split_belongs_to_a_hub_id(name: str) -> None:
    assert datasets.config.HF_HUB_OFFLINE  # the tests reach no network
    with pytest.raises(DataError) as error:
        expand([name], "data.train")
    assert f"data.train: {name}: there is no such file, and as a Hugging Face hub id it cannot be loaded" in str(
        error.value
    )


@pytest.mark.parametrize("name", ["no/such/file@train", "../missing@train", "missing.json", "folder/missing.jsonl"])
def test_a_path_that_is_missing_is_not_looked_up(name: str) -> None:
    with pytest.raises(DataError, match=r"no such file or directory \(from the working directory, /.*\)$"):
        expand([name], "data.train")


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows@train.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert [source.dataset for source in expand(["rows@train.jsonl"], "data.train")] == [None]


@pytest.mark.parametrize("name", ["gone.json", "gone.jsonl", "gone.csv", "gone.parquet", "gone.txt"])
def test_a_file_that_vanishes_is_named(name, tmp_path) -> None:
    path = str(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: cannot be read: .*[Nn]o such file"):
        [list(row["text"]) for _, row in Source(path, "digest").rows()]
