"""Checked rows on disk, with final ids; and one side of a data set, which is some of them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sftmix.data.store import Record, key_of, open_rows, rows_of
from sftmix.types import Example, Int64, Message

EXAMPLE = [
    ("id", pa.string()),
    ("source", pa.string()),
    ("messages", pa.large_string()),
    ("label", pa.string()),
    ("columns", pa.string()),
]
"""The columns of an Example; messages and columns are JSON. A document is one message of the role text."""


def stored(example: Example) -> Record:
    """Return the values of the columns of EXAMPLE."""
    return {
        "id": example.id,
        "source": example.source,
        "messages": json.dumps([astuple(message) for message in example.messages], ensure_ascii=False),
        "label": example.label,
        "columns": json.dumps(dict(example.columns)),
    }


def example_of(row: Record) -> Example:
    """Make the Example of a row with the columns of EXAMPLE."""
    messages = tuple(Message(*fields) for fields in json.loads(row["messages"]))
    return Example(row["id"], messages, row["source"], row["label"], json.loads(row["columns"]))


def content_hash(messages: Sequence[Message]) -> str:
    """Hash of the turns in their order, and of nothing else; 16 hex digits."""
    text = json.dumps([[m.role, m.content, m.trained] for m in messages], ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def examples_of(row: Example, *, whole: bool) -> Iterator[Example]:
    """Make the examples of a conversation; an empty response is not trained.

    whole  one example, up to its last trained turn, as those behind it teach nothing; else each trained turn is one,
           with the conversation up to it
    """
    places = [place for place, m in enumerate(row.messages) if m.trained and m.content.strip()]
    system = row.messages[0].role == "system"
    several = sum(message.trained for message in row.messages) > 1
    for trained in [places] if whole else [[place] for place in places]:
        last = trained[-1]
        messages = tuple(replace(m, trained=i in trained) for i, m in enumerate(row.messages[: last + 1]))
        turn = f"@turn{(last - system) // 2}" if several and not whole else ""
        yield replace(row, id=row.id + turn, messages=messages)


class Conversations:
    """The conversations or documents of one side: records of a directory, in file order, read when they are asked for.

    records      i64[n], the records of this side; at first all of the directory
    parts        None, or i64[n, 2], the characters [start, end) of each document that belong to this side
    is_text      they are documents
    fingerprint  hash of the rows' content, the same under any file names
    cache_key    hash of the content and of the files' names, which the records give as their source
    """

    def __init__(self, directory: Path, fingerprint: str, cache_key: str, is_text: bool) -> None:
        self._table = open_rows(directory / "rows.arrow")
        self.records: Int64 = np.arange(self._table.num_rows)
        self.parts: Int64 | None = None
        self.fingerprint, self.cache_key, self.is_text = fingerprint, cache_key, is_text

    def some(self, records: Int64, parts: Int64 | None = None) -> Conversations:
        """Make a side of these records, which are some of its own; of documents, of these parts of them."""
        if len(records) == len(self.records) and parts is None:
            return self
        numbers = records if parts is None else np.concatenate([records, parts.reshape(-1)])
        chosen = hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()
        side = copy.copy(self)
        side.records, side.parts = records, parts
        side.fingerprint, side.cache_key = key_of(self.fingerprint, chosen), key_of(self.cache_key, chosen)
        return side

    def values(self, column: str) -> list[Any]:
        """Read one column (id, source, label, columns as JSON, content) of this side."""
        return self._table[column].take(pa.array(self.records)).to_pylist()

    def read(self, records: Int64) -> Iterator[Example]:
        """Read these records as their rows have them, with empty responses, and turns behind the last trained one."""
        return map(example_of, rows_of(self._table, records))

    def examples(self, *, whole: bool) -> Iterator[Example]:
        """Read the conversations of this side as examples; without `whole`, each of their trained turns is one."""
        for row in self.read(self.records):
            yield from examples_of(row, whole=whole)

    def documents(self) -> Iterator[tuple[Example, str, bool, bool]]:
        """Read (document, its text on this side, that begins with the document, it ends with it) of each document."""
        for place in range(len(self.records)):
            (document,) = self.read(self.records[place : place + 1])
            text = document.messages[0].content
            start, end = (0, len(text)) if self.parts is None else self.parts[place].tolist()
            yield document, text[start:end], start == 0, end == len(text)
