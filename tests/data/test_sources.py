"""Hub ids, their subsets and splits: what counts as one, and what is said where it cannot be loaded."""

import json
from pathlib import Path

import datasets
import pytest

from sftmix.common.errors import DataError
from sftmix.data.sources import Source, expand


def test_files_that_cannot_be_read_are_named(write, refused, tmp_path):
    for path, reason in [
        ("a\0b", "no such file"),
        (write("empty.jsonl", b""), "empty"),
        (write("rows.jsonl.gz", b"x"), "'.gz' are not read"),
        (write("blank.jsonl", b"\n\n"), "no usable row"),
        (write("noarray.json", "[]"), "no usable row"),
        (write("rows.parquet", b"PAR1 nothing"), "not a readable Parquet file"),
    ]:
        message = refused(path)[0]
        assert reason in message
        assert Path(path).name in message or "data.train" in message
    (tmp_path / "folder").mkdir()
    assert "no file ending in" in refused(str(tmp_path / "folder"))[0]


@pytest.mark.parametrize("name", ["no-such/set@train[:50%]", "no/set:main"])
def test_a_split_belongs_to_a_hub_id(name):
    assert datasets.config.HF_HUB_OFFLINE  # the tests reach no network
    with pytest.raises(DataError) as error:
        expand([name], "data.train")
    assert str(error.value).startswith(f"data.train: {name}: there is no such file, and as a Hugging Face hub id")


@pytest.mark.parametrize("name", ["no/such/file@train", "../missing@train", "missing.json", "folder/missing.jsonl"])
def test_a_path_that_is_missing_is_not_looked_up(name):
    with pytest.raises(DataError, match=r"no such file .*\(from the working directory, /.*\); name a file"):
        expand([name], "data.train")


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows@train.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert [source.dataset for source in expand(["rows@train.jsonl"], "data.train")] == [None]


@pytest.mark.parametrize("name", ["gone.json", "gone.jsonl", "gone.csv", "gone.parquet", "gone.txt"])
def test_a_file_that_vanishes_is_named(name, tmp_path):
    path = str(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: cannot be read: .*[Nn]o such file"):
        list(Source(path, "digest").rows())


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
def test_a_subset_is_read(subsets, name, said):
    (source,) = expand([f"openai/gsm8k:{name}"], "data.train")
    assert [row["answer"] for _, row in source.rows()] == [f"{said} {i}" for i in range(3)]


@pytest.mark.parametrize("name", ["@train", "@test", ":man"])
def test_subsets_are_listed_where_none_or_a_wrong_one_is_named(subsets, name):
    with pytest.raises(DataError, match=rf"^data.train: openai/gsm8k{name}: .*SUBSET.*: \['main', 'socratic'\][^\n]*$"):
        expand([f"openai/gsm8k{name}"], "data.train")


# ----------------------------------------------------------------------------------------------- text files


def test_text_files_are_documents(write, read):
    crlf = write("a.txt", b"\xef\xbb\xbfOne.\r\n\r\nTwo caf\xc3\xa9s.\r\n")
    prepared = read(crlf, write("b.txt", "Three.\n"), write("c.txt", " \n\n"))
    texts = [text for _, text, _, _ in prepared.train.documents()]
    assert texts == ["One.\n\nTwo cafés.\n", "Three.\n"]
    assert (prepared.report.counts, prepared.report.rows) == ({"empty_document": 1}, 3)
    rows = read(write("rows.jsonl", [{"text": text} for text in texts]), format="text")
    assert prepared.train.values("id") == rows.train.values("id")


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"text": "a b", "id": "x", "source": "web"}], True),
        ([{"text": "a", "instruction": "b", "output": "c"}], False),  # as the hub's Alpaca has it
        ([{"text": "a", "messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}], False),
    ],
)
def test_auto_takes_rows_for_text_by_their_only_known_field(rows, text, write, read):
    assert read(write("rows.jsonl", rows)).text is text


@pytest.mark.parametrize("first", ['{"text": "a', "42", '{"body": "b"}'], ids=["broken", "number", "unknown"])
def test_a_bad_row_does_not_say_what_the_others_are(first, write, read, refused):
    path = write("rows.jsonl", "\n".join([first, '{"text": "One tale."}', '{"text": "Two tales."}']))
    prepared = read(path, skip_bad=True)
    assert [text for _, text, _, _ in prepared.train.documents()] == ["One tale.", "Two tales."]
    assert prepared.report.counts == {"bad_row": 1}
    assert refused(path)[1].startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x" * 70_000 + b"\n\n\xc3", ": text contains a lone surrogate or bytes that are not UTF-8"),
        ("a.txt", b"one\ntwo\0\n", r": text contains a NUL"),
        ("a.jsonl", [{"text": "a"}, {"text": None}], r":2: text must be a string, found null"),
        ("a.jsonl", [{"text": "a"}, {"body": "b"}], r":2: field 'text' is missing"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', r":2: text contains a lone surrogate"),
        ("a.jsonl", [{"instruction": "a", "output": "b"}, {"text": "c"}], r":2: a text, where the rows before"),
        ("a.jsonl", [{"id": "m", "text": "Call me."}, {"id": "m", "text": "Whale."}], r":2: the id 'm' is taken"),
    ],
)
def test_bad_documents_are_named(name, content, message, write, refused):
    path = write(name, content)
    assert refused(path)[1].startswith(path + message)


def test_a_text_file_has_a_limit(monkeypatch, write, refused):
    monkeypatch.setattr("sftmix.data.sources.MAX_TEXT_BYTES", 10)
    path = write("a.txt", "x" * 11)
    assert refused(path)[1] == f"{path}: a document of 11 bytes; the limit is 10: cut it into several"


def test_text_files_beside_rows_are_notes_about_them(write, read, tmp_path):
    write("README.txt", "About these rows.\n")
    assert len(read(str(tmp_path)).train.records) == 1
    write("rows.jsonl", [{"text": "a tale"}])
    assert len(read(str(tmp_path)).train.records) == 1
    assert len(read(str(tmp_path), format="text").train.records) == 2
