"""Hashes of large files that are known from before: a model of 141 GB is read once, not at each start.

A note has the hash with size, time and inode of the file, in `hashes/` of the cache. A file with all three as noted is
taken for the same. Whoever checks hashes reads the file anew.
"""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from sftmix.disk.files import read_json, write_json
from sftmix.disk.hashes import sha256_file, sha256_json
from sftmix.disk.places import cache_root
from sftmix.words.errors import DifferenceError

LARGE = 2**26
"""Least bytes of a file that gets a note: 64 MiB take about 50 ms to hash."""

_anew: ContextVar[bool] = ContextVar("anew", default=False)


@contextlib.contextmanager
def hashing_anew() -> Iterator[None]:
    """Believe no note; what is hashed is noted anew."""
    token = _anew.set(True)
    try:
        yield
    finally:
        _anew.reset(token)


def known_hash(path: Path) -> str:
    """Return the hash of a file, read only if it is small or is not the file that was noted."""
    state = _state(path)
    if state["bytes"] < LARGE:
        return sha256_file(path)
    place = path.resolve()
    note = cache_root() / "hashes" / f"{sha256_json(str(place))[:32]}.json"
    if not _anew.get():
        with contextlib.suppress(OSError, DifferenceError):  # none yet, or one that was damaged
            noted = read_json(note, content=str)
            if noted == {**state, "file": str(place), "content": noted["content"]}:
                return noted["content"]
    found = sha256_file(path)
    if _state(path) == state:  # else it was written meanwhile
        with contextlib.suppress(OSError):  # without a note the next start reads the file again
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {**state, "file": str(place), "content": found})
    return found


def _state(path: Path) -> dict[str, int]:
    about = os.stat(path)
    return {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns, "inode": about.st_ino}
