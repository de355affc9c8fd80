"""Files and directories that appear whole or not at all."""

import hashlib
import json

import pytest

from sftmix.disk.files import (
    MANIFEST,
    commit_directory,
    fresh_directory,
    hashed,
    read_json,
    read_steps,
    verify_directory,
    write_json,
    write_text,
)
from sftmix.disk.hashes import sha256_file, sha256_json
from sftmix.words.errors import DifferenceError


def test_hashes_are_sha256(tmp_path):
    content = bytes(range(256)) * 9000  # longer than one read
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_hash_of_a_value_ignores_the_order_of_keys_only():
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": "1"}, {"b": 1}, {"a": [1]}, {}]
    assert len({sha256_json(value) for value in different}) == len(different)


def test_text_replaces_a_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_text(path, "first")
    write_json(path, {"ä": 1.5})
    assert read_json(path) == {"ä": 1.5}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert read_json(path) == {"a": 1}


@pytest.fixture
def committed(tmp_path):
    final = tmp_path / "step-1"
    staging = fresh_directory(final)
    (staging / "weights").write_bytes(b"12345")
    (staging / "inner").mkdir()
    (staging / "inner" / "state.json").write_text("{}")
    assert not final.exists()
    commit_directory(staging, final, about={"step": 1})
    assert not staging.exists()
    return final


def test_a_committed_directory_verifies_and_lists_every_file(committed):
    assert verify_directory(committed) is None
    manifest = json.loads((committed / MANIFEST).read_text())
    assert manifest["step"] == 1
    expected = {"bytes": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}
    assert manifest["files"]["weights"] == expected
    assert set(manifest["files"]) == {"weights", "inner/state.json"}


OTHER_HASH, UNREADABLE = "does not have the hash", "its manifest is unreadable"


ENTRIES = (None, 3, "x", [], {}, {"bytes": 5}, {"bytes": "x", "sha256": ""}, {"bytes": -1, "sha256": None})
"""What no run writes of a file, under a manifest with the hash of it."""


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["weights", "../x.jsonl", "a\0b"])
def test_entries_of_any_form_are_a_problem(committed, name, entry):
    (committed.parent / "x.jsonl").write_text("12345")
    write_json(committed / MANIFEST, hashed({"files": {name: entry}}))
    for part in ((0, 1), (0, 2)):
        assert verify_directory(committed, within=committed.parent, part=part)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("weights", b"1234", f"weights {OTHER_HASH}"),
        ("weights", b"12344", f"weights {OTHER_HASH}"),
        ("weights", None, "weights is missing"),
        ("more.safetensors", b"", "more.safetensors is not a file of it"),
        (MANIFEST, b'{"files": {}, "sha256": "0"}', OTHER_HASH),
        (MANIFEST, None, UNREADABLE),
        (MANIFEST, b"{", UNREADABLE),
        (MANIFEST, b"[]", UNREADABLE),
        (MANIFEST, b'{"step": 1}', UNREADABLE),
    ],
)
def test_what_is_wrong_is_named(committed, name, content, problem):
    if content is None:
        (committed / name).unlink()
    else:
        (committed / name).write_bytes(content)
    assert problem in str(verify_directory(committed))


def test_an_invalid_directory_is_replaced(committed):
    (committed / "weights").write_bytes(b"?")
    (committed / "stray").touch()
    staging = fresh_directory(committed)
    (staging / "weights").write_bytes(b"new")
    commit_directory(staging, committed, about={})
    assert verify_directory(committed) is None
    assert sorted(p.name for p in committed.iterdir()) == [MANIFEST, "weights"]


def test_leftovers_of_this_directory_only_are_removed(tmp_path):
    mine, other = tmp_path / ".tmp-step-1.77", tmp_path / ".tmp-step-2.77"
    for leftover in (mine, other):
        leftover.mkdir()
    staging = fresh_directory(tmp_path / "step-1")
    assert not mine.exists()
    assert other.exists()
    assert list(staging.iterdir()) == []


def test_a_step_that_is_there_twice_is_refused(tmp_path):
    lines = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 3, "lo')
    assert [line["step"] for line in read_steps(tmp_path)] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text(2 * lines)
    with pytest.raises(DifferenceError, match=r"metrics.jsonl is not as a run writes it .*a step is there twice"):
        read_steps(tmp_path)
