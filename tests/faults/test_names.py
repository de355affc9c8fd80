"""Names that lead elsewhere: nothing is written outside the run directory, and no URL is ever fetched."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sftmix.data.sources import hub_parts

NAMES = {
    "URL": "https://example.com/x",
    "S3": "s3://bucket/x",
    "hub URL": "hf://datasets/a/b",
    "NUL": "a\0b",
    "newline": "a\nb",
    "long": "a" * 300,
    "passwd": "../../../../../../../../etc/passwd",
    "absolute": "/etc/passwd",
    "home": "~nobody/../x",
    "empty part": "a//b/../c/d",
}
READ = {
    "--data.train": 3,
    "--model.path": 2,
    "--reference.model.path": 2,
    "--data.template": 2,
}


@pytest.fixture
def no_network(monkeypatch):
    """Every try to find a host is noted, and fails."""
    asked: list[object] = []

    def refuse(*where: object, **_: object) -> None:
        asked.append(where)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


def tree(directory: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.parametrize("option", READ)
def test_what_is_read_is_there_or_refused(option, finished, tmp_path, monkeypatch, no_network, sftmix):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = {"--model.path": str(finished.tiny.model), "--data.train": str(finished.tiny.train), "--out": "run"}
    for kind, name in NAMES.items():
        before = tree(tmp_path)
        words = [word for pair in (given | {option: name}).items() for word in pair]
        done = sftmix("reference", *words, "--reference.checkpoints", "2", "--training.max_steps", "2")
        assert done.code == READ[option], (kind, done.err)
        assert "Traceback" not in done.err
        changed = {path for path, time in tree(tmp_path).items() if before.get(path) != time}
        assert all(path.startswith(str(tmp_path / "here" / "run")) for path in changed - {str(tmp_path / "here")})


REFUSED = ("URL", "S3", "hub URL", "NUL", "newline", "long", "passwd", "absolute")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_written_has_a_name_that_can_be_seen(kind, finished, tmp_path, monkeypatch, no_network, sftmix):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    for words in (
        ["run", *finished.tiny.options, "--out", NAMES[kind]],
        ["export", str(finished.path), "--to", NAMES[kind]],
        ["export", NAMES[kind], "--to", "exported"],
        ["status", NAMES[kind]],
    ):
        done = sftmix(*words)
        assert done.code == 2, (words, done.err)
        assert "Traceback" not in done.err
    assert tree(tmp_path) == before


def test_a_run_directory_that_looks_like_a_url_is_read_as_files(tmp_path, monkeypatch, no_network):
    """A table is opened as a file: of a name pyarrow would make a file system of its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sftmix.common.tables import read_confidence

    monkeypatch.chdir(tmp_path)
    place = Path("s3:/bucket")
    place.mkdir(parents=True)
    columns = {"id": ["a"], "confidence": [1.0], "variability": [0.0], "n_tokens": [1]}
    with open(place / "confidence.parquet", "wb") as file:
        pq.write_table(pa.table(columns), file)
    assert read_confidence(place / "confidence.parquet")[0] == ["a"]


@pytest.mark.parametrize(
    "name",
    [
        "a/b@../../x",
        "a/b@x/y",
        "a/b:../x@train",
        "a/b:..@train",
        "a/b:x\n@train",
        "a/b@train\n",
        "a/b\n",
        "../b",
        "a/..",
        "a/b@.",
        "a\0b",
        "a/b:\0",
        "https://a/b",
    ],
)
def test_no_hub_id(name):
    assert hub_parts(name) is None


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b@train[:50%]", ("a/b", None, "train[:50%]")),
        ("a/b:main@train[10:20]+test", ("a/b", "main", "train[10:20]+test")),
        ("a/b:20220301.en", ("a/b", "20220301.en", "train")),
        ("squad@train_sft[:10%](pct1_dropremainder)", ("squad", None, "train_sft[:10%](pct1_dropremainder)")),
    ],
)
def test_hub_ids(name, parts):
    assert hub_parts(name) == parts
