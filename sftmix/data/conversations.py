"""Checked rows on disk, one record each, with final ids; and one side of a data set, which is some of the records."""

from __future__ import annotations

import copy
import hashlib
import json
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sftmix.common.rng import stable_hash
from sftmix.data.store import RowFile, RowWriter, key_of
from sftmix.types import Example, Int64, Message

Side = TypeVar("Side", bound="Conversations")

WHOLE = -1
"""Stands in place of a turn where the example is the whole conversation."""

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


class ConversationWriter(ExitStack):
    """Writer of checked rows to `directory`; `finish` gives repeated ids their `#k`.

    records  number of records written so far
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.records = 0
        self._rows = self.enter_context(RowWriter(directory / "rows.arrow", SCHEMA))
        self._hashes = array("Q")
        self._explicit = array("b")

    def add(self, example: Example, turns: list[int], content: str) -> None:
        """Write one record.

        example  with the row's own id, or ""
        turns    places of the assistant turns to train on, at least one; for a document, which has no turns, none
        content  16 hex digits of a hash of the content
        """
        self.records += 1
        self._hashes.append(stable_hash(example.id or content) & (2**64 - 1))
        self._explicit.append(bool(example.id))
        self._rows.add(
            {
                "id": example.id or content,
                "source": example.source,
                "messages": [{"role": m.role, "content": m.content} for m in example.messages],
                "turns": turns,
                "several": sum(m.trained for m in example.messages) > 1,
                "label": example.label,
                "columns": json.dumps(dict(example.columns)) if example.columns else None,
                "content": int(content, 16),
            }
        )

    def finish(self) -> tuple[Int64, Int64]:
        """Number repeated ids.

        Returns two i64 arrays: records whose own id is taken by an earlier one (they are left out), and records that
        repeat the content of an earlier one.
        """
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        explicit = np.frombuffer(self._explicit, dtype=np.int8) == 1
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1  # places of ids that are those of the place before
        del ordered  # of millions of rows, most have an id of their own: only the others take room from here on
        first = np.flatnonzero(np.diff(again, prepend=-1) != 1)
        before = np.repeat(again[first] - 1, np.diff(np.append(first, len(again))))
        ordinal = np.zeros(len(order), dtype=np.int32)
        ordinal[order[again]] = again - before
        taken = (ordinal > 0) & explicit
        ordinal[taken] = -1
        np.save(self.directory / "ordinal.npy", ordinal, allow_pickle=False)
        return np.flatnonzero(taken), np.flatnonzero(ordinal > 0)


def content_hash(messages: tuple[Message, ...]) -> str:
    """Hash of the turns in their order, and of nothing else; 16 hex digits."""
    turns = [[m.role, m.content, m.trained] for m in messages]
    text = json.dumps(turns, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Conversations:
    """The conversations of one side: records of a directory, numbered in file order, read when they are asked for.

    records      i64[n], the records of this side; at first all of the directory but those whose own id was taken
    fingerprint  hash of the rows' content, the same under any file names
    cache_key    hash of the content and of the files' names, which the records give as their source
    """

    def __init__(self, directory: Path, fingerprint: str = "", cache_key: str = "") -> None:
        self.file = RowFile(directory / "rows.arrow")
        self._ordinal = np.load(directory / "ordinal.npy", mmap_mode="r", allow_pickle=False)
        self.records: Int64 = np.flatnonzero(self._ordinal >= 0)
        self.fingerprint = fingerprint
        self.cache_key = cache_key

    def some(self: Side, records: Int64) -> Side:
        """Make a side of these records, which are some of its own."""
        return self if len(records) == len(self.records) else self._side(records, records)

    def _side(self: Side, records: Int64, numbers: Int64) -> Side:
        """Make a side of these records; `numbers` stand for the choice in the keys."""
        chosen = hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()
        side = copy.copy(self)
        side.records = records
        side.fingerprint, side.cache_key = key_of(self.fingerprint, chosen), key_of(self.cache_key, chosen)
        return side

    @cached_property
    def content(self) -> npt.NDArray[np.uint64]:
        """u64, hash of the content of each record of the file; equal conversations have equal hashes."""
        return self.file.column("content").to_numpy()

    def id(self, record: int) -> str:
        """The conversation's id."""
        return self._numbered(record, self.file.cell(record, "id").as_py())

    def _numbered(self, record: int, base: str) -> str:
        number = int(self._ordinal[record])
        return f"{base}#{number}" if number else base

    def source(self, record: int) -> str:
        """`file:line`, `file:line[index]` or `file[index]`."""
        return self.file.cell(record, "source").as_py()

    def label(self, record: int) -> str | None:
        """The row's label, if it has one."""
        return self.file.cell(record, "label").as_py()

    def columns(self, record: int) -> dict[str, Any]:
        """The row's other scalar fields."""
        return json.loads(self.file.cell(record, "columns").as_py() or "{}")

    def example(self, record: int, turn: int = WHOLE) -> Example:
        """Read one example, see `examples_at`."""
        return next(self.examples_at(np.array([record]), np.array([turn])))

    def examples(self, records: Int64, *, whole: bool) -> Iterator[tuple[int, int, Example]]:
        """Read (record, turn, example) of the given records, in their order; without `whole`, of each trained turn."""
        for record, stored in zip(records.tolist(), self.file.rows(records), strict=True):
            for turn in (WHOLE,) if whole else stored["turns"]:
                yield record, turn, self._example(record, stored, turn)

    def examples_at(self, records: Int64, turns: Int64) -> Iterator[Example]:
        """Read the example of each (record, turn), in their order: of the whole conversation, or of one up to a turn.

        In the second case that turn alone is trained. A whole conversation ends with its last trained turn: the turns
        behind it teach nothing.
        """
        for record, turn, stored in zip(records.tolist(), turns.tolist(), self.file.rows(records), strict=True):
            yield self._example(record, stored, turn)

    def _example(self, record: int, stored: dict[str, Any], turn: int) -> Example:
        trained = set(stored["turns"]) if turn == WHOLE else {turn}
        turns = enumerate(stored["messages"][: max(trained) + 1])
        messages = tuple(Message(m["role"], m["content"], i in trained) for i, m in turns)
        name = self._numbered(record, stored["id"])
        if turn != WHOLE and stored["several"]:
            name += f"@turn{(turn - (messages[0].role == 'system')) // 2}"
        return Example(name, messages, stored["source"], stored["label"], json.loads(stored["columns"] or "{}"))
