"""Checked rows on disk, one record each, with final ids; and one side of a data set, which is some of the records."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sftmix.common.rng import stable_hash
from sftmix.common.shown import quoted
from sftmix.data.jsonrows import BadRow
from sftmix.data.store import key_of, open_rows, rows_of
from sftmix.types import Example, Int64, Message

WHOLE = -1
"""Stands in place of a turn where the example is the whole conversation."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        (
            "messages",
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.string()),
                        ("content", pa.large_string()),
                        ("trained", pa.bool_()),
                        ("weight", pa.float64()),
                    ]
                )
            ),
        ),
        ("label", pa.string()),
        ("columns", pa.string()),
        ("content", pa.uint64()),
    ]
)
"""A document is one message of the role text."""


def record_of(example: Example, content: str, times: Counter[int]) -> dict[str, Any]:
    """Return the record of an example, with its own id or its hash; the k-th repetition of a hash has `#k` at its end.

    content  16 hex digits of a hash of the content
    times    how often each id came before, by its hash
    Raises BadRow for an own id that an earlier row has.
    """
    hashed = stable_hash(example.id or content)
    repeats = times[hashed]
    times[hashed] += 1
    if repeats and example.id:
        raise BadRow(f"the id {quoted(example.id)} is taken by an earlier row")
    return {
        "id": (example.id or content) + (f"#{repeats}" if repeats else ""),
        "source": example.source,
        "messages": [asdict(message) for message in example.messages],
        "label": example.label,
        "columns": json.dumps(dict(example.columns)),
        "content": int(content, 16),
    }


def content_hash(messages: Sequence[Message]) -> str:
    """Hash of the turns in their order, and of nothing else; 16 hex digits."""
    text = json.dumps([[m.role, m.content, m.trained] for m in messages], ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Conversations:
    """The conversations or documents of one side: records of a directory, in file order, read when they are asked for.

    records      i64[n], the records of this side; at first all of the directory
    parts        None, or i64[n, 2], the characters [start, end) of each document that belong to this side
    is_text      they are documents
    fingerprint  hash of the rows' content, the same under any file names
    cache_key    hash of the content and of the files' names, which the records give as their source
    """

    def __init__(self, directory: Path, fingerprint: str, cache_key: str, is_text: bool) -> None:
        self.table = open_rows(directory / "rows.arrow")
        self.records: Int64 = np.arange(self.table.num_rows)
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

    def values(self, column: str, records: Int64 | None = None) -> list[Any]:
        """Read one column (id, source, label, columns as JSON, content) of these records, or of all of this side."""
        chosen = self.records if records is None else records
        return self.table[column].take(pa.array(chosen)).to_pylist()

    def source(self, record: int) -> str:
        """`file:line`, `file:line[index]` or `file[index]`."""
        return self.table["source"][record].as_py()

    def documents(self) -> Iterator[tuple[int, str, bool, bool]]:
        """Read (record, text, it begins with the document, it ends with it) of each document of this side."""
        for place, record in enumerate(self.records.tolist()):
            text = self.table["messages"][record][0]["content"].as_py()
            start, end = (0, len(text)) if self.parts is None else self.parts[place].tolist()
            yield record, text[start:end], start == 0, end == len(text)

    def examples(self, records: Int64, *, whole: bool) -> Iterator[tuple[int, int, Example]]:
        """Read (record, turn, example) of the given records, in their order; without `whole`, of each trained turn."""
        for record, stored in zip(records.tolist(), rows_of(self.table, records), strict=True):
            for turn in (WHOLE,) if whole else _trained(stored["messages"]):
                yield record, turn, _example(stored, turn)

    def examples_at(self, records: Int64, turns: Int64) -> Iterator[Example]:
        """Read the example of each (record, turn), in their order: of the whole conversation, or of one up to a turn.

        In the second case that turn alone is trained. A whole conversation ends with its last trained turn: the turns
        behind it teach nothing.
        """
        for turn, stored in zip(turns.tolist(), rows_of(self.table, records), strict=True):
            yield _example(stored, turn)


def _trained(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Return the places of the turns that are trained; an empty response is not."""
    return [place for place, m in enumerate(messages) if m["trained"] and m["content"].strip()]


def _example(stored: dict[str, Any], turn: int) -> Example:
    name, given = stored["id"], stored["messages"]
    trained = _trained(given) if turn == WHOLE else [turn]
    messages = tuple(Message(**{**m, "trained": i in trained}) for i, m in enumerate(given[: trained[-1] + 1]))
    if turn != WHOLE and sum(m["trained"] for m in given) > 1:
        name += f"@turn{(turn - (messages[0].role == 'system')) // 2}"
    return Example(name, messages, stored["source"], stored["label"], json.loads(stored["columns"]))
