"""Hashes of large files that are known from before: a model of 141 GB is read once, not at each start.

A note has the hash, in `hashes/` of the cache. Its name is made of place, size, time and inode of the file: a file with
all four as noted is taken for the same. Whoever checks hashes reads the file anew.
"""

import contextlib
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
    state = file_state(path)
    if path.stat().st_size < LARGE:
        return sha256_file(path)
    note = cache_root() / "hashes" / f"{sha256_json(state)[:32]}.json"
    if not _anew.get():
        with contextlib.suppress(DifferenceError):  # none yet, or one that was damaged
            return str(read_json(note, content=str)["content"])
    found = sha256_file(path)
    if file_state(path) == state:  # else it was written meanwhile
        with contextlib.suppress(OSError):  # without a note the next start reads the file again
            write_json(note, {"content": found})
    return found


def file_state(path: Path) -> list[object]:
    """Return place, size, time and inode of a file, which is another one if any of them is."""
    about = path.stat()
    return [str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino]
