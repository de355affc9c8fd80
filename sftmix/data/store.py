"""Storage of rows: Arrow files, and the cache directory that holds them.

Every directory in the cache has a key. The key changes with everything that its rows depend on, never with file times.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from sftmix.common.errors import ConfigError, NoSpaceError
from sftmix.common.files import commit_directory, verify_directory
from sftmix.types import Int64

CODE_VERSION = 2
"""Part of every key: raise it whenever the same rows, tokenizer and options would give other tokens or ids."""

BATCH_ROWS = 1024
"""Most rows of a record batch in an Arrow file."""
BATCH_CHARACTERS = 1 << 24
"""Characters of a batch after which it is written: Arrow's strings have room for 2 GiB, and memory may have less."""
AT_ONCE = 256
"""Rows that are read and tokenised together: enough for the tokenizer's threads, little memory."""


# ------------------------------------------------------------------------------------------- the directory


def cache_root(cache_dir: str | None) -> Path:
    """`cache_dir`, else $SFTMIX_CACHE, else ~/.cache/sftmix."""
    return Path(cache_dir or os.environ.get("SFTMIX_CACHE") or "~/.cache/sftmix").expanduser()


def key_of(*parts: Any) -> str:
    """Hash of parts that JSON can write, 32 hex digits."""
    text = json.dumps([CODE_VERSION, *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def get_or_build(root: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Return the directory `root/name` and its summary; build it first if it is absent or incomplete.

    `build(directory)` writes files and returns a summary that JSON can write. The directory is built under another name
    and renamed when it is complete, so no reader sees half of it. Of several processes one builds, and the others wait,
    on other machines, too, where their file system has locks.

    Raises ConfigError when nothing can be written under `root`, NoSpaceError when the disk is full.
    """
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
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
            try:
                summary = build(scratch)
                (scratch / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
                try:
                    commit_directory(scratch, target, about={})
                except OSError:
                    if _read(target) is None:  # else another process has finished the same key first
                        raise
                return target, summary
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(
            f"cannot write the tokenisation cache under {root}: {error.strerror or error}. "
            "Free some space there, or choose another place with --data.cache_dir or $SFTMIX_CACHE."
        ) from error


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock, so that the same work is not done twice at once; it spares work, and nothing else depends on it.

    Two may still build the same where a file system has no locks, and after a build that failed: the lock file is
    removed at the end, and one who waits for it and one who comes later then hold two different files.
    """
    with lock.open("a+", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)  # not flock, which forked workers would keep
        os.listdir(lock.parent)  # NFS might else remember that what the other has made is not there
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _read(target: Path) -> dict[str, Any] | None:
    if verify_directory(target) is not None:  # absent or damaged: the caller builds it again
        return None
    return dict(json.loads((target / "summary.json").read_text(encoding="utf-8")))


# --------------------------------------------------------------------------------------------- Arrow files


class RowWriter:
    """Writer of an Arrow IPC file, row by row."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        self._rows: list[dict[str, Any]] = []
        self._characters = 0

    def add(self, row: dict[str, Any], characters: int = 0) -> None:
        """Write a row, column -> value; a column that the row lacks is null.

        characters  length of its long texts
        """
        self._rows.append(row)
        self._characters += characters
        if len(self._rows) == BATCH_ROWS or self._characters > BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
        self._rows, self._characters = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                self._writer.close()
        finally:
            self._sink.close()


class RowFile:
    """A file of RowWriter behind a memory map: any row can be read, and none is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()
        self._columns = dict(zip(self._table.column_names, self._table.columns, strict=True))

    def __len__(self) -> int:
        return self._table.num_rows

    def cell(self, row: int, column: str) -> pa.Scalar:
        """One value; `row` counts from 0 and must be in range."""
        return self._columns[column][row]

    def rows(self, rows: Int64) -> Iterator[dict[str, Any]]:
        """Whole rows in the given order; neighbours are read together."""
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            for start in range(0, len(run), AT_ONCE):
                part = run[start : start + AT_ONCE]
                yield from self._table.slice(int(part[0]), len(part)).to_pylist()

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column, still on disk."""
        return self._columns[name]
