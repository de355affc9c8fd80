"""Checked rows on disk: one conversation per record, with final ids."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sftmix.common.rng import stable_hash
from sftmix.data.arrow import RowFile, RowWriter
from sftmix.data.formats import Conversation
from sftmix.types import Example, Message, Rows

WHOLE = -1
"""In place of a turn: the example is the whole conversation."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("turns", pa.list_(pa.int32())),
        ("several", pa.bool_()),
        ("label", pa.string()),
        ("columns", pa.string()),
        ("content", pa.uint64()),
    ]
)


class ConversationWriter:
    """Streams conversations into `directory`; `finish` gives the duplicates of ids their `#k`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._rows = RowWriter(directory / "rows.arrow", SCHEMA)
        self._hashes = array("Q")
        self._explicit = array("b")

    def __enter__(self) -> ConversationWriter:
        self._rows.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._rows.__exit__(*error)

    def add(self, conversation: Conversation, source: str, turns: list[int], content: str | None = None) -> None:
        """Write one record.

        turns    places of the assistant turns to train on, at least one (none for a document, which has no turns)
        content  16 hex digits of a hash of the content; None: the hash of the turns
        """
        content = content or conversation.content_hash()
        own = conversation.id if conversation.id is not None else content
        self._hashes.append(stable_hash(own) & (2**64 - 1))
        self._explicit.append(conversation.id is not None)
        self._rows.add(
            {
                "id": own,
                "source": source,
                "messages": [{"role": m.role, "content": m.content} for m in conversation.messages],
                "turns": turns,
                "several": sum(m.trained for m in conversation.messages) > 1,
                "label": conversation.label,
                "columns": json.dumps(dict(conversation.columns)) if conversation.columns else None,
                "content": int(content, 16),
            }
        )

    def finish(self) -> tuple[Rows, Rows]:
        """After the last row: (records whose explicit id is taken, records that repeat an earlier conversation)."""
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        explicit = np.frombuffer(self._explicit, dtype=np.int8) == 1
        order = np.argsort(hashes, kind="stable")
        starts = np.flatnonzero(np.r_[True, hashes[order][1:] != hashes[order][:-1]])
        lengths = np.diff(np.r_[starts, len(order)])
        ordinal = np.empty(len(order), dtype=np.int32)
        ordinal[order] = np.arange(len(order)) - np.repeat(starts, lengths)
        taken = (ordinal > 0) & explicit
        ordinal[taken] = -1
        np.save(self._directory / "ordinal.npy", ordinal, allow_pickle=False)
        return np.flatnonzero(taken), np.flatnonzero(ordinal > 0)


class Conversations:
    """Random access to the conversations of a directory; records are numbered in file order."""

    def __init__(self, directory: Path) -> None:
        self._file = RowFile(directory / "rows.arrow")
        self._ordinal = np.load(directory / "ordinal.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def valid(self) -> Rows:
        """i64: records that may be used (not those whose explicit id was taken)."""
        return np.flatnonzero(self._ordinal >= 0)

    @cached_property
    def content(self) -> npt.NDArray[np.uint64]:
        """u64[records]: hash of the content, equal for equal conversations."""
        return self._file.column("content").to_numpy()

    def id(self, record: int) -> str:
        """The conversation's id."""
        return self._numbered(record, self.id_as_written(record))

    def _numbered(self, record: int, base: str) -> str:
        number = int(self._ordinal[record])
        return f"{base}#{number}" if number else base

    def id_as_written(self, record: int) -> str:
        """The row's own id or the hash of its content, without `#k`."""
        return str(self._file.cell(record, "id").as_py())

    def source(self, record: int) -> str:
        return str(self._file.cell(record, "source").as_py())

    def label(self, record: int) -> str | None:
        return self._file.cell(record, "label").as_py()

    def columns(self, record: int) -> dict[str, Any]:
        stored = self._file.cell(record, "columns").as_py()
        return json.loads(stored) if stored else {}

    def turns(self, record: int) -> list[int]:
        """Places of the assistant turns to train on."""
        return self._file.cell(record, "turns").as_py()

    def example(self, record: int, turn: int = WHOLE) -> Example:
        """The whole conversation, or the conversation up to the assistant turn at place `turn`, which alone is trained.

        A whole conversation ends with its last trained turn: what follows teaches nothing.
        """
        return self._example(record, next(self._file.rows(np.array([record]))), turn)

    def examples(self, records: Rows, *, whole: bool) -> Iterator[tuple[int, int, Example]]:
        """(record, turn, example) of the given records, in their order."""
        for record, stored in zip(records.tolist(), self._file.rows(records), strict=True):
            for turn in (WHOLE,) if whole else stored["turns"]:
                yield record, turn, self._example(record, stored, turn)

    def examples_at(self, records: Rows, turns: Rows) -> Iterator[Example]:
        """The example of each (record, turn), in their order."""
        for record, turn, stored in zip(records.tolist(), turns.tolist(), self._file.rows(records), strict=True):
            yield self._example(record, stored, turn)

    def _example(self, record: int, stored: dict[str, Any], turn: int) -> Example:
        trained = set(stored["turns"]) if turn == WHOLE else {turn}
        found = enumerate(stored["messages"][: max(trained) + 1])
        messages = tuple(Message(m["role"], m["content"], i in trained) for i, m in found)
        columns = json.loads(stored["columns"]) if stored["columns"] else {}
        return Example(self._id(record, stored, turn), messages, stored["source"], stored["label"], columns)

    def _id(self, record: int, stored: dict[str, Any], turn: int) -> str:
        """The conversation's id, or that of the example of one of its assistant turns."""
        base = self._numbered(record, stored["id"])
        if turn == WHOLE or not stored["several"]:
            return base
        return f"{base}@turn{turn // 2 if stored['messages'][0]['role'] == 'user' else (turn - 1) // 2}"
