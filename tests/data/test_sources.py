"""Hub ids, their subsets and splits: what counts as one, and what is said where it cannot be loaded."""

from __future__ import annotations

import json

import datasets
import pytest

from sftmix.common.errors import DataError
from sftmix.common.names import HUB_ID
from sftmix.data.rows import prepare
from sftmix.data.sources import Source, expand, hub_parts


@pytest.mark.parametrize("name", ["tatsu-lab/alpaca", "HuggingFaceH4/ultrachat_200k", "squad", "a.b/c-d_e.f"])
def test_hub_ids(name: str) -> None:
    assert HUB_ID.match(name)


@pytest.mark.parametrize(
    "name", ["a/b/c", "/a/b", "./a", "../a", "a/", "a/..", "", "a b/c", "a@b", "~/rows", "a\n", "a/b\n"]
)
def test_what_is_no_hub_id(name: str) -> None:
    assert not HUB_ID.match(name)


@pytest.mark.parametrize("name", ["no-such/set@train_sft", "no-such/set@train[:50%]", "no-such/set", "no/set:main"])
def test_a_split_belongs_to_a_hub_id(name: str) -> None:
    assert datasets.config.HF_HUB_OFFLINE  # the tests reach no network
    with pytest.raises(DataError) as error:
        expand([name], "data.train")
    assert str(error.value).startswith(f"data.train: {name}: there is no such file, and as a Hugging Face hub id")


@pytest.mark.parametrize("name", ["no/such/file@train", "../missing@train", "missing.json", "folder/missing.jsonl"])
def test_a_path_that_is_missing_is_not_looked_up(name: str) -> None:
    with pytest.raises(DataError, match=r"no such file .*\(from the working directory, /.*\); name a file"):
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


def test_what_a_directory_holds_besides_is_told(write, options, tmp_path) -> None:
    """Not the hidden files; those without rows are no reason to refuse the others."""
    rows = tmp_path / "rows"
    (rows / "more").mkdir(parents=True)
    for name in ("a.jsonl", "README.md", "notes.txt", ".hidden", "more/b.jsonl"):
        (rows / name).write_text('{"prompt": "p", "completion": "c"}\n')
    note = f"{rows}: 3 left out of this directory: README.md, more/, notes.txt"
    for _ in range(2):  # from the file, from the cache
        report = prepare(options(str(rows)), 0, progress=False).report
        assert (report.rows, report.lines()[0]) == (1, note)
    for number in range(9):
        (rows / f"{number}.log").touch()
    report = prepare(options(str(rows)), 0, progress=False).report
    assert report.lines()[0] == f"{rows}: 12 left out of this directory: 0.log, 1.log, 2.log, 3.log, 4.log, ..."


def test_a_compressed_file_of_rows_in_a_directory_is_refused(write, options, tmp_path) -> None:
    write("a.jsonl", [{"prompt": "p", "completion": "c"}])
    (tmp_path / "images.tar.gz").touch()
    assert prepare(options(str(tmp_path)), 0, progress=False).report.rows == 1
    write("b.jsonl.gz", b"\x1f\x8b")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: files ending in '\.gz' are not read"):
        prepare(options(str(tmp_path)), 0, progress=False)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("openai/gsm8k:main@test", ("openai/gsm8k", "main", "test")),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "train")),
        ("tatsu-lab/alpaca@train[:50%]", ("tatsu-lab/alpaca", None, "train[:50%]")),
        ("wikimedia/wikipedia:20231101.en@train[10:20]", ("wikimedia/wikipedia", "20231101.en", "train[10:20]")),
        ("squad", ("squad", None, "train")),
        ("openai/gsm8k:", None),
        ("openai/gsm8k:a:b", None),
        ("../gsm8k:main", None),
        ("a/b/c:main@train", None),
    ],
)
def test_the_parts_of_a_hub_id(name, parts) -> None:
    assert hub_parts(name) == parts


README = """\
---
configs:
- config_name: main
  data_files:
  - {split: train, path: main.jsonl}
  - {split: test, path: test.jsonl}
- config_name: socratic
  data_files: [{split: train, path: socratic.jsonl}]
---
"""


@pytest.fixture
def subsets(tmp_path, monkeypatch) -> None:
    """A data set with two subsets, a directory here; `datasets` loads it as it loads one of the hub."""
    directory = tmp_path / "openai" / "gsm8k"
    directory.mkdir(parents=True)
    (directory / "README.md").write_text(README)
    for name in ("main", "test", "socratic"):
        rows = [{"question": f"Say {name} {i}.", "answer": f"{name} {i}"} for i in range(3)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")


@pytest.mark.parametrize(("name", "said"), [("main", "main"), ("main@test", "test"), ("socratic@train", "socratic")])
def test_a_subset_is_read(subsets, name, said) -> None:
    (source,) = expand([f"openai/gsm8k:{name}"], "data.train")
    assert [row["answer"] for _, row in source.rows()] == [f"{said} {i}" for i in range(3)]


@pytest.mark.parametrize("name", ["@train", "@test", ":man"])
def test_subsets_are_listed_where_none_or_a_wrong_one_is_named(subsets, name) -> None:
    with pytest.raises(DataError, match=rf"^data.train: openai/gsm8k{name}: .*SUBSET.*: \['main', 'socratic'\][^\n]*$"):
        expand([f"openai/gsm8k{name}"], "data.train")
