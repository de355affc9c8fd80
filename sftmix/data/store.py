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
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from sftmix.common.errors import ConfigError, NoSpaceError
from sftmix.common.files import commit_directory, verify_directory
from sftmix.types import Int64

CODE_VERSION = 2
"""Part of every key: raise it whenever the same rows, tokenizer and options would give other tokens or ids."""

BATCH_ROWS = 1024
"""Rows of a record batch in an Arrow file."""
OPEN_BATCHES = 256
"""Record batches of a file that stay open: their heads are not read again."""

_SILENCE = 3.0
"""Seconds that a process waits for another one before it says so."""


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
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
            try:
                summary = build(scratch)
                (scratch / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
                if target.exists() and _read(target) is None:
                    print(f"{target} is not as it was written, and is made again", file=sys.stderr)
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
        said, started = False, time.monotonic()
        while not _taken(file):
            if not said and time.monotonic() > started + _SILENCE:
                print(f"waiting for another process, which fills {lock.parent}", file=sys.stderr, flush=True)
                said = True
            time.sleep(0.05)
        os.listdir(lock.parent)  # NFS might else remember that what the other has made is not there
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _taken(file: IO[str]) -> bool:
    """Take the lock of a file if nobody has it; a file system without locks always gives it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked workers would keep
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def _read(target: Path) -> dict[str, Any] | None:
    if verify_directory(target) is not None:  # absent or damaged: the caller builds it again
        return None
    return dict(json.loads((target / "summary.json").read_text(encoding="utf-8")))


# --------------------------------------------------------------------------------------------- Arrow files


class RowWriter:
    """Writer of an Arrow IPC file, row by row; every record batch but the last holds BATCH_ROWS rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, column -> value; a column that the row lacks is null."""
        self._rows.append(row)
        if len(self._rows) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __enter__(self) -> RowWriter:
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
        reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
        self.schema, self._count = reader.schema, reader.num_record_batches
        # Opened when they are asked for: the heads of all batches are in memory else, with all pages around each.
        self._batch = lru_cache(OPEN_BATCHES)(reader.get_batch)

    def __len__(self) -> int:
        return BATCH_ROWS * (self._count - 1) + self._batch(self._count - 1).num_rows if self._count else 0

    def cell(self, row: int, column: str) -> pa.Scalar:
        """One value; `row` counts from 0 and must be in range."""
        batch, index = divmod(row, BATCH_ROWS)
        return self._batch(batch).column(column)[index]

    def rows(self, rows: Int64) -> Iterator[dict[str, Any]]:
        """Whole rows in the given order; neighbours in one record batch are read together."""
        batch = rows // BATCH_ROWS
        cuts = np.flatnonzero(np.diff(batch)) + 1
        for part in np.split(rows, cuts) if len(rows) else ():
            yield from self._batch(int(part[0]) // BATCH_ROWS).take(pa.array(part % BATCH_ROWS)).to_pylist()

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column, still on disk."""
        field = self.schema.field(name)
        batches = map(self._batch, range(self._count))
        return pa.chunked_array([batch.column(name) for batch in batches], type=field.type)
