"""Storage of rows: Arrow files in a directory of the cache, and a side of a data set (training or held-out rows)."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import pyarrow as pa

from sftmix.data.report import DataReport
from sftmix.disk.cache import Record, key_of, short_hash
from sftmix.options.data import DataOptions
from sftmix.text.examples import examples_of
from sftmix.types import Example, Int64, Message
from sftmix.words.fields import TEXT

AT_ONCE = 256
"""Most rows that are tokenised and written together: enough for the tokenizer's threads, little memory."""

CHARACTERS = 1 << 20
"""Characters of their texts from which on no more rows are added: tokenising takes some 150 times their size."""

Item = TypeVar("Item")

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


# --------------------------------------------------------------------------------------------- Arrow files


def in_parts(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Divide items into parts of at most AT_ONCE, which end as soon as they have CHARACTERS.

    size  function: an item -> its characters
    """
    part = list[Item]()
    characters = 0
    for item in items:
        part.append(item)
        characters += size(item)
        if len(part) == AT_ONCE or characters >= CHARACTERS:
            yield part
            part = []
            characters = 0
    if part:
        yield part


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[Record]) -> int:
    """Write an Arrow IPC file of rows with the columns of EXAMPLE and others, column -> value; return their number.

    A column that a row lacks is null.
    """
    count = 0
    with pa.ipc.new_file(str(path), schema) as writer:
        for part in in_parts(rows, lambda row: len(row["messages"])):
            writer.write_batch(pa.RecordBatch.from_pylist(part, schema=schema))
            count += len(part)
    return count


def open_rows(path: Path) -> pa.Table:
    """Open a file of `write_rows` behind a memory map: no row is read before it is asked for."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def rows_of(table: pa.Table, rows: Int64) -> Iterator[Record]:
    """Read whole rows in the given order, one at a time."""
    # [3, 4, 5, 9] -> [3, 4, 5], [9]: neighbours are one slice of the table.
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        part = table.slice(int(run[0]) if len(run) else 0, len(run))
        for values in zip(*part.columns, strict=True):
            yield {name: value.as_py() for name, value in zip(table.column_names, values, strict=True)}


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


def content_hash(messages: Sequence[Message]) -> str:
    """Hash of the turns in their order, or of a document's text, and of nothing else; 16 hex digits."""
    if messages[0].role == TEXT:
        return short_hash(messages[0].content.encode())
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


class Conversations:
    """The conversations or documents of one side: records of a directory, in file order, read when they are asked for.

    records  i64[n], the records of this side; at first all of the directory
    key      of the cache: hash of all that the records depend on, and of the chosen ones
    """

    def __init__(self, directory: Path, key: str) -> None:
        self._table, self.key = open_rows(directory / "rows.arrow"), key
        self.records = np.arange(self._table.num_rows)

    def some(self, records: Int64) -> Self:
        """Return a side with some of the records of this one."""
        if len(records) == len(self.records):  # all of them: the key stays
            return self
        side = copy.copy(self)  # with the same memory map
        side.records = records
        side.key = key_of(rows=self.key, chosen=hashlib.sha256(records.astype("<i8").tobytes()).hexdigest())
        return side

    def values(self, column: str) -> list[Any]:
        """Read one column (id, source, label, columns and prompting as JSON, content) of this side."""
        return self._table[column].take(self.records).to_pylist()

    def read(self) -> Iterator[Example]:
        """Read the rows as they are, with empty responses and turns behind the last trained one."""
        return map(example_of, rows_of(self._table, self.records))

    def examples(self, *, whole: bool) -> Iterator[Example]:
        """Read the rows of this side as examples; without `whole`, each of their trained turns is one."""
        for row in self.read():
            yield from examples_of(row, whole=whole)


class Prepared(NamedTuple):
    """Checked rows, ready to be tokenised any number of times by `sftmix.data.encode_dataset`.

    train, eval  the two sides; eval is None without held-out rows
    report       rows read, dropped and named so far
    options      the options under which the rows were read; data.format is text if all files are documents
    thinks       some training row has a thought
    """

    train: Conversations
    eval: Conversations | None
    report: DataReport
    options: DataOptions
    thinks: bool = False
