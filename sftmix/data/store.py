"""Storage of rows: Arrow files, and the cache directory that holds them.

Every directory in the cache has a key. The key changes with everything that its rows depend on, never with file times.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from sftmix.common.errors import ConfigError, NoSpaceError
from sftmix.common.files import commit_directory, is_full, read_json, verify_directory, write_json
from sftmix.types import Int64

CODE_VERSION = 3
"""Part of every key: raise it whenever the same rows, tokenizer and options would give other tokens or ids."""

Record = dict[str, Any]
"""A stored row, column -> value; or the summary of a directory."""

AT_ONCE = 256
"""Rows that are read, tokenised and written together: enough for the tokenizer's threads, little memory."""


# ------------------------------------------------------------------------------------------- the directory


def key_of(*parts: Any) -> str:
    """Hash of parts that JSON can write, 32 hex digits."""
    text = json.dumps([CODE_VERSION, *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def get_or_build(cache_dir: str | None, name: str, build: Callable[[Path], Record]) -> tuple[Path, Record]:
    """Return the directory of this name in the cache, and its summary; build it first if it is absent or incomplete.

    The cache is `cache_dir`, else $SFTMIX_CACHE, else ~/.cache/sftmix.

    `build(directory)` writes files and returns a summary that JSON can write. The directory is built under another name
    and renamed when it is complete, so no reader sees half of it. Of several processes one builds, and the others wait,
    on other machines, too, where their file system has locks.

    Raises ConfigError when nothing can be written there, NoSpaceError when the disk is full.
    """
    root = Path(cache_dir or os.environ.get("SFTMIX_CACHE") or "~/.cache/sftmix").expanduser()
    target = root / name
    if (summary := _read(target)) is not None:
        return target, summary
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / f".{name}.lock"):
            if (summary := _read(target)) is not None:  # made while this process waited
                return target, summary
            if target.exists():
                print(f"{target} is not as it was written, and is made again", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=root, ignore_cleanup_errors=True) as scratch:
                summary = build(Path(scratch))
                write_json(Path(scratch, "summary.json"), summary)
                try:
                    commit_directory(Path(scratch), target, about={})
                except OSError:
                    if _read(target) is None:  # else another process has finished the same key first
                        raise
                return target, summary
    except OSError as error:
        kind = NoSpaceError if is_full(error) else ConfigError
        raise kind(
            f"cannot write the tokenisation cache under {root}: {error.strerror or error}. "
            "Free some space there, or choose another place with --data.cache_dir or $SFTMIX_CACHE."
        ) from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock, so that the same work is not done twice at once; it spares work, and nothing else depends on it.

    Two may still build the same where a file system has no locks.
    """
    lock = FileLock(path)
    with contextlib.suppress(OSError):  # a file system without locks
        lock.acquire()
    try:
        os.listdir(path.parent)  # NFS might else remember that what the other has made is not there
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            path.unlink()  # before the release: who waits for it then takes a new file, as one who comes later does
        lock.release()


def _read(target: Path) -> Record | None:
    damage = verify_directory(target)  # absent or damaged: the caller builds it again
    return read_json(target / "summary.json") if damage is None else None


# --------------------------------------------------------------------------------------------- Arrow files


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[Record], batch: int = AT_ONCE) -> int:
    """Write an Arrow IPC file of rows, column -> value, `batch` rows at a time; return their number.

    A column that a row lacks is null.
    """
    count, rest = 0, iter(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while part := list(itertools.islice(rest, batch)):
            writer.write_batch(pa.RecordBatch.from_pylist(part, schema=schema))
            count += len(part)
    return count


def open_rows(path: Path) -> pa.Table:
    """Open a file of `write_rows` behind a memory map: no row is read before it is asked for."""
    return pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()


def rows_of(table: pa.Table, rows: Int64) -> Iterator[Record]:
    """Read whole rows in the given order; neighbours are read together."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        for start in range(0, len(run), AT_ONCE):
            part = run[start : start + AT_ONCE]
            yield from table.slice(int(part[0]), len(part)).to_pylist()
