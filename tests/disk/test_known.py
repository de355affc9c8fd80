"""Hashes of large files that are known from before: by size, time and inode, and never believed by a check."""

import hashlib
import os
from pathlib import Path

import pytest

from sftmix.disk import known
from sftmix.disk.known import hashing_anew, known_hash


@pytest.fixture
def reads(tmp_path, monkeypatch) -> list[Path]:
    """The files that are read to the end; here each file is large."""
    found: list[Path] = []

    def noted(path: Path) -> str:
        found.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setenv("SFTMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "LARGE", 1)
    monkeypatch.setattr(known, "sha256_file", noted)
    return found


def test_a_file_is_read_once(tmp_path, reads):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    hashes = [known_hash(file) for _ in range(3)]
    assert hashes == [hashlib.sha256(b"weights").hexdigest()] * 3
    (tmp_path / "link").symlink_to(file)
    assert known_hash(tmp_path / "link") == hashes[0]
    assert reads == [file]


@pytest.mark.parametrize("change", ["content", "time", "inode", "note", "damaged note"])
def test_it_is_read_again_if_anything_changed(tmp_path, reads, change):
    file, content = tmp_path / "model.safetensors", b"weights"
    file.write_bytes(content)
    about = file.stat()
    known_hash(file)
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    if change == "content":
        file.write_bytes(content := b"weightz")
    elif change == "time":
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    elif change == "inode":  # another file under the name, with size and time of the first
        (tmp_path / "new").write_bytes(content := b"heights")
        os.utime(tmp_path / "new", ns=(about.st_atime_ns, about.st_mtime_ns))
        os.replace(tmp_path / "new", file)
    elif change == "note":
        note.unlink()
    else:
        note.write_bytes(note.read_bytes()[:20])
    for _ in range(2):
        assert known_hash(file) == hashlib.sha256(content).hexdigest()
    assert reads == [file, file]


def test_a_check_reads_anew_and_finds_what_a_note_would_hide(tmp_path, reads):
    """Another content with size, time and inode of the first."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    about = file.stat()
    first = known_hash(file)
    file.write_bytes(b"damaged")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert known_hash(file) == first
    with hashing_anew():
        assert known_hash(file) == hashlib.sha256(b"damaged").hexdigest()
    assert known_hash(file) == hashlib.sha256(b"damaged").hexdigest()


def test_without_a_place_for_notes_files_are_read(tmp_path, reads, monkeypatch):
    (tmp_path / "cache").write_bytes(b"a file is in the way")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    assert [known_hash(file) for _ in range(2)] == [hashlib.sha256(b"weights").hexdigest()] * 2
    assert reads == [file, file]


def test_small_files_have_no_notes(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(known, "LARGE", 8)
    file = tmp_path / "config.json"
    file.write_bytes(b"{}")
    assert known_hash(file) == known_hash(file) == hashlib.sha256(b"{}").hexdigest()
    assert not (tmp_path / "cache").exists()
