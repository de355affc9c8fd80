"""The cache: directories under keys that change with all that their content depends on, never with file times."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sftmix.disk.files import commit_directory, is_full, read_json, remove_leftovers, verify_directory, write_json
from sftmix.disk.hashes import sha256_json
from sftmix.disk.places import cache_root
from sftmix.words.errors import ConfigError, NoSpaceError

SOURCES = ("text/*", "data/*", "types/*", "words/*", "components/renderer", "components/row_format", "disk/texts")
"""The modules that are between a file of rows and the token ids that are stored of it."""

Record = dict[str, Any]
"""A stored row, column -> value; or the summary of a directory."""

PATIENCE = 10.0
"""Seconds of waiting for another process before a line says for what."""


def short_hash(content: bytes) -> str:
    """Return the hash of some bytes, 16 hex digits."""
    return blake2b(content, digest_size=8).hexdigest()


@cache
def code_version() -> str:
    """Return the hash of SOURCES: entries of another release, or from before an edit, are not read."""
    package = Path(__file__).parents[1]
    files = sorted(path for name in SOURCES for path in package.glob(f"{name}.py"))
    return sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def key_of(**fields: Any) -> str:
    """Return the key of an entry: the hash of all that decides its content, by name, and of the code; 32 hex digits.

    fields  values that JSON can write
    """
    return sha256_json({"code": code_version(), **fields})[:32]


# Read; else lock, read again, build beside it, rename, unlock.
def get_or_build(cache_dir: str | None, name: str, build: Callable[[Path], Record]) -> tuple[Path, Record]:
    """Return the directory of this name in the cache, and its summary; build it first if it is absent or incomplete.

    What a killed process left of it is removed.

    The cache is `cache_root(cache_dir)`.

    `build(directory)` writes files and returns a summary that JSON can write. The directory is built under another name
    and renamed when it is complete, so no reader sees half of it. If several processes need it, one builds and
    the others wait, also on other machines if their file system has locks; elsewhere two may build the same, which does
    no harm.

    Raises ConfigError when nothing can be written there, NoSpaceError when the disk is full. Errors of `build` about
    other files, or about none, are raised as they are.
    """
    root = cache_root(cache_dir)
    target, lock = root / name, FileLock(root / f".{name}.lock")
    if (summary := _read(target)) is not None:  # what is there needs no lock, and no right to write
        return target, summary
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # a file system without locks
            _take(lock, target)
        try:
            if lock.is_locked:  # then nobody else builds it
                remove_leftovers(root, name)
            os.listdir(root)  # NFS might else remember that what another process has made meanwhile is not there
            if (summary := _read(target)) is not None:
                return target, summary
            if target.exists():
                print(f"{target} is not as it was written, and is made again", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix=f".tmp-{name}.", dir=root, ignore_cleanup_errors=True) as scratch:
                place = Path(scratch, name)
                place.mkdir()  # a directory of tempfile is for one user, and a cache may be for several
                summary = build(place)
                write_json(place / "summary.json", summary)
                try:
                    commit_directory(place, target, about={})
                except OSError:
                    if _read(target) is None:  # else another process has finished the same key first
                        raise
                return target, summary
        finally:
            with contextlib.suppress(OSError):  # Windows keeps a file that is open
                os.unlink(lock.lock_file)  # before the release: a process that waits for it then takes a new file
            lock.release()
    except OSError as error:
        if not _is_of(root, error):
            raise
        kind = NoSpaceError if is_full(error) else ConfigError
        raise kind(
            f"cannot write the tokenisation cache under {root}: {error.strerror or error}. "
            "Mend that, or choose another place with --data.cache_dir or $SFTMIX_CACHE."
        ) from error


def _is_of(root: Path, error: OSError) -> bool:
    """Return True for an error about a file of the cache, a directory above it, or a write that names no file.

    A component of yours may open other files, or ask a server: requests.ConnectionError has no number.
    """
    place, root = (Path(str(name)).resolve() for name in (error.filename or root, root))
    return error.errno is not None and (place.is_relative_to(root) or root.is_relative_to(place))


def _take(lock: FileLock, target: Path) -> None:
    """Take a lock; a line says for what, if that lasts."""
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        print(f"waiting for a process that makes {target}; if there is none, delete {lock.lock_file}", file=sys.stderr)
        lock.acquire()


def _read(target: Path) -> Record | None:
    damage = verify_directory(target)  # absent or damaged: the caller builds it again
    return read_json(target / "summary.json") if damage is None else None
