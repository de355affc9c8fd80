"""Storage of rows: Arrow files, the cache directory that holds them, and one side of a data set, which is some of them.

Every directory in the cache has a key. The key changes with everything that its rows depend on, never with file times.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from sftmix.common.component import Component, code_of, files_of
from sftmix.common.errors import ConfigError, NoSpaceError
from sftmix.common.files import (
    commit_directory,
    is_full,
    read_json,
    remove_leftovers,
    sha256_file,
    sha256_json,
    verify_directory,
    write_json,
)
from sftmix.common.places import place_of
from sftmix.data.report import DataReport
from sftmix.data.thoughts import answers
from sftmix.options import DataOptions
from sftmix.types import Example, Int64, Message

CODE_VERSION = 12
"""Part of every key: raise it whenever the same rows, tokenizer and options would give other tokens or ids."""

Record = dict[str, Any]
"""A stored row, column -> value; or the summary of a directory."""

PATIENCE = 10.0
"""Seconds of waiting for another process before a line says for what."""
AT_ONCE = 256
"""Rows that are read, tokenised and written together: enough for the tokenizer's threads, little memory."""

EXAMPLE = [
    ("id", pa.string()),
    ("source", pa.string()),
    ("messages", pa.large_string()),
    ("label", pa.string()),
    ("columns", pa.string()),
    ("prompting", pa.string()),
]
"""The columns of an Example; messages, columns and prompting (its tools) are JSON. A document is one
message of the role text."""


# ------------------------------------------------------------------------------------------- the directory


def key_of(*parts: Any) -> str:
    """Hash of parts that JSON can write, 32 hex digits."""
    return sha256_json([CODE_VERSION, *parts])[:32]


def identity(form: Component | str) -> Any:
    """Return what a format or renderer is known by: its word, or its class with options, source and hashes of files."""
    if isinstance(form, str):
        return form
    return [form.spec(), code_of(form), {name: sha256_file(place_of(name)) for name in files_of(form)}]


# Read; else lock, read again, build beside it, rename, unlock.
def get_or_build(cache_dir: str | None, name: str, build: Callable[[Path], Record]) -> tuple[Path, Record]:
    """Return the directory of this name in the cache, and its summary; build it first if it is absent or incomplete.

    What a killed process left of it is removed.

    The cache is `cache_dir`, else $SFTMIX_CACHE, else ~/.cache/sftmix.

    `build(directory)` writes files and returns a summary that JSON can write. The directory is built under another name
    and renamed when it is complete, so no reader sees half of it. If several processes need it, one builds and
    the others wait, also on other machines if their file system has locks; elsewhere two may build the same, which does
    no harm.

    Raises ConfigError when nothing can be written there, NoSpaceError when the disk is full.
    """
    root = Path(cache_dir or os.environ.get("SFTMIX_CACHE") or "~/.cache/sftmix").expanduser()
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
        kind = NoSpaceError if is_full(error) else ConfigError
        raise kind(
            f"cannot write the tokenisation cache under {root}: {error.strerror or error}. "
            "Mend that, or choose another place with --data.cache_dir or $SFTMIX_CACHE."
        ) from error


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


# --------------------------------------------------------------------------------------------- Arrow files


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[Record], batch: int = AT_ONCE) -> int:
    """Write an Arrow IPC file of rows, column -> value, `batch` rows at a time; return their number.

    A column that a row lacks is null.
    """
    count = 0
    rest = iter(rows)
    with pa.ipc.new_file(str(path), schema) as writer:
        while part := list(itertools.islice(rest, batch)):
            writer.write_batch(pa.RecordBatch.from_pylist(part, schema=schema))
            count += len(part)
    return count


def open_rows(path: Path) -> pa.Table:
    """Open a file of `write_rows` behind a memory map: no row is read before it is asked for."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def rows_of(table: pa.Table, rows: Int64, at_once: int = AT_ONCE) -> Iterator[Record]:
    """Read whole rows in the given order; at most `at_once` neighbours are read together."""
    # [3, 4, 5, 9] -> [3, 4, 5], [9]: neighbours are one slice of the table.
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        for start in range(0, len(run), at_once):
            part = run[start : start + at_once]
            yield from table.slice(int(part[0]), len(part)).to_pylist()


# ------------------------------------------------------------------------------------------------ examples


def stored(example: Example) -> Record:
    """Return the values of the columns of EXAMPLE."""
    return {
        "id": example.id,
        "source": example.source,
        "messages": json.dumps([_plain(message) for message in example.messages], ensure_ascii=False),
        "label": example.label,
        "columns": json.dumps(example.columns),
        "prompting": json.dumps(example.tools, ensure_ascii=False),
    }


def example_of(row: Record) -> Example:
    """Make the Example of a row with the columns of EXAMPLE."""
    messages = tuple(Message(*fields) for fields in json.loads(row["messages"]))
    columns, tools = json.loads(row["columns"]), json.loads(row["prompting"])
    return Example(row["id"], messages, row["source"], row["label"], columns, tuple(tools))


def _plain(message: Message) -> tuple[Any, ...]:
    """Return the fields of a turn; those that most turns lack are left out at the end."""
    fields = astuple(message)
    return fields if any(fields[4:]) else fields[:4]  # ["user", "Hi", false, 1.0]


def short_hash(content: bytes) -> str:
    """Hash of some bytes, 16 hex digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def content_hash(messages: Sequence[Message]) -> str:
    """Hash of the turns in their order, and of nothing else; 16 hex digits."""
    # Thoughts and calls only where there are any: plain rows keep the ids that they had before these were read.
    turns = [[m.role, m.content, m.trained, *([m.thought, m.more] if m.thought or m.more else [])] for m in messages]
    return short_hash(json.dumps(turns, separators=(",", ":")).encode())


def id_of(row: Example, content: str) -> str:
    """Return the id of a conversation without one: its content's hash, with what else is trained, if it has such.

    That is its functions, and weights of its trained turns and their parts.
    """
    weights = {k: [m.weight, m.parts] for k, m in enumerate(row.messages) if m.trained and (m.weight != 1 or m.parts)}
    more = [row.tools, {}, weights]  # an empty object where rows once had more
    return short_hash(json.dumps([content, *more]).encode()) if any(more) else content


def examples_of(row: Example, *, whole: bool) -> Iterator[Example]:
    """Make the examples of a conversation; a response without an answer or a call is not trained.

    whole  one example, up to its last trained turn, as those behind it teach nothing; else each trained turn is one,
           with the conversation up to it
    """
    places = [place for place, message in enumerate(row.messages) if message.trained and answers(message)]
    several = sum(message.trained for message in row.messages) > 1
    for trained in [places] if whole else [[place] for place in places]:
        last = trained[-1]
        messages = tuple(replace(m, trained=i in trained) for i, m in enumerate(row.messages[: last + 1]))
        # Those that are not trained count as well: @turn1 is the second answer of the conversation.
        number = sum(message.role == "assistant" for message in row.messages[:last])
        turn = f"@turn{number}" if several and not whole else ""
        yield replace(row, id=row.id + turn, messages=messages)


class Conversations:
    """The conversations or documents of one side: records of a directory, in file order, read when they are asked for.

    records      i64[n], the records of this side; at first all of the directory
    is_text      they are documents
    fingerprint  hash of the rows' content, the same under any file names
    cache_key    hash of the content and of the files' names, which the records give as their source
    """

    def __init__(self, directory: Path, fingerprint: str, cache_key: str, is_text: bool) -> None:
        self._table = open_rows(directory / "rows.arrow")
        self.records = np.arange(self._table.num_rows)
        self.fingerprint, self.cache_key, self.is_text = fingerprint, cache_key, is_text

    def some(self, records: Int64) -> Self:
        """Return a side with some of the records of this one."""
        if len(records) == len(self.records):  # all of them: the keys stay
            return self
        chosen = hashlib.sha256(records.astype("<i8").tobytes()).hexdigest()
        side = copy.copy(self)  # with the same memory map
        side.records = records
        side.fingerprint, side.cache_key = key_of(self.fingerprint, chosen), key_of(self.cache_key, chosen)
        return side

    def values(self, column: str) -> list[Any]:
        """Read one column (id, source, label, columns and prompting as JSON, content) of this side."""
        return self._table[column].take(self.records).to_pylist()

    def read(self) -> Iterator[Example]:
        """Read the rows with empty responses, and turns behind the last trained one; documents one at a time."""
        return map(example_of, rows_of(self._table, self.records, 1 if self.is_text else AT_ONCE))

    def examples(self, *, whole: bool) -> Iterator[Example]:
        """Read the conversations of this side as examples; without `whole`, each of their trained turns is one."""
        for row in self.read():
            yield from examples_of(row, whole=whole)


class Prepared(NamedTuple):
    """Checked rows, ready to be tokenised any number of times by `sftmix.data.encode`.

    train, eval  the two sides; eval is None without held-out rows
    report       rows read, dropped and named so far
    options      the options under which the rows were read
    thinks       some training row has a thought
    """

    train: Conversations
    eval: Conversations | None
    report: DataReport
    options: DataOptions
    thinks: bool = False

    @property
    def text(self) -> bool:
        """The rows are documents of plain text."""
        return self.train.is_text
