"""Checked rows on disk, with final ids; and one side of a data set, which is some of them.

Which ones: some of each source (data.take), without those of a list (data.exclude), held out or not.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sftmix.common.errors import ConfigError
from sftmix.common.rng import stable_hash
from sftmix.common.shown import quoted
from sftmix.data.formats import RESERVED_ID
from sftmix.data.report import DataReport
from sftmix.data.store import key_of, open_rows, rows_of
from sftmix.types import Example, Int64, Message

EXAMPLE = [
    ("id", pa.string()),
    ("source", pa.string()),
    ("messages", pa.large_string()),
    ("label", pa.string()),
    ("columns", pa.string()),
]
"""The columns of an Example; messages and columns are JSON. A document is one message of the role text."""


def stored(example: Example) -> dict[str, Any]:
    """Return the values of the columns of EXAMPLE."""
    return {
        "id": example.id,
        "source": example.source,
        "messages": json.dumps([astuple(message) for message in example.messages], ensure_ascii=False),
        "label": example.label,
        "columns": json.dumps(dict(example.columns)),
    }


def example_of(row: dict[str, Any]) -> Example:
    """Make the Example of a row with the columns of EXAMPLE."""
    messages = tuple(Message(*fields) for fields in json.loads(row["messages"]))
    return Example(row["id"], messages, row["source"], row["label"], json.loads(row["columns"]))


def content_hash(messages: Sequence[Message]) -> str:
    """Hash of the turns in their order, and of nothing else; 16 hex digits."""
    text = json.dumps([[m.role, m.content, m.trained] for m in messages], ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def examples_of(row: Example, *, whole: bool) -> list[Example]:
    """Make the examples of a conversation; an empty response is not trained.

    whole  one example, up to its last trained turn, as those behind it teach nothing; else each trained turn is one,
           with the conversation up to it
    """
    places = [place for place, m in enumerate(row.messages) if m.trained and m.content.strip()]
    system = row.messages[0].role == "system"
    several = sum(message.trained for message in row.messages) > 1
    examples = []
    for trained in [places] if whole else [[place] for place in places]:
        last = trained[-1]
        messages = tuple(replace(m, trained=i in trained) for i, m in enumerate(row.messages[: last + 1]))
        turn = f"@turn{(last - system) // 2}" if several and not whole else ""
        examples.append(replace(row, id=row.id + turn, messages=messages))
    return examples


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


# -------------------------------------------------------------------------------------------- which rows


def take(
    rows: Conversations,
    sizes: Sequence[float | None],
    names: Sequence[str],
    written: Sequence[int],
    seed: int,
    report: DataReport,
) -> Conversations:
    """Take some rows of each entry of data.train, those with the smallest hash of (seed, id); a note counts them.

    sizes    data.take: a number of rows, a share of them, or None for all
    names    the entries of data.train
    written  records of each entry, which stand one after the other
    Raises ConfigError for more rows than there are, and for a share that is no row.
    """
    chosen, notes = [], []
    entries = np.split(rows.records, np.cumsum(written)[:-1])
    for size, name, records in zip(sizes, names, entries, strict=True):
        total = len(records)
        count = total if size is None else size if isinstance(size, int) else round(size * total)
        if size is not None and not 1 <= count <= total:
            raise ConfigError(
                f"data.take {size} of {name} is {count:,} of {total:,} usable rows; name a number from 1 to "
                f"{total:,}, or null for all of them"
            )
        chosen.append(_drawn(rows, records, count, seed, "take"))
        notes.append(f"{count:,} of {total:,} from {name}")
    report.notes.append(f"rows taken (data.take): {', '.join(notes)}")
    return rows.some(np.concatenate(chosen))


def exclude(rows: Conversations, path: str, report: DataReport) -> Conversations:
    """Leave out the rows that a file names, one in each line: an id, that of a turn, too, or `file:line`.

    Raises ConfigError for a file that cannot be read, and for a name that is no row's.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.exclude: {path} cannot be read: {error}") from error
    names = {RESERVED_ID.sub("", line.strip()) for line in lines} - {""}
    known = list(zip(rows.values("id"), rows.values("source"), strict=True))
    if unknown := sorted(names.difference(chain(*known))):
        raise ConfigError(
            f"data.exclude: {path} names {len(unknown):,} that are no rows of data.train, such as "
            f"{quoted(unknown[0])}; give an id or file:line in each line, as `sftmix suspects` shows them"
        )
    remaining = np.array([names.isdisjoint(pair) for pair in known])
    for k in np.flatnonzero(~remaining):
        report.add("excluded", f"{known[k][0]} ({known[k][1]})")
    return rows.some(rows.records[remaining])


def divide(rows: Conversations, fraction: float, seed: int, report: DataReport) -> tuple[Conversations, Conversations]:
    """Divide rows into (training side, held-out side): whole rows by their hash, or the last part of each document.

    With fewer than 2 / fraction documents, the last part of each is held out. Windows from inside a document are not:
    the model would be tested on text that stands between trained text.
    """
    total = len(rows.records)
    if rows.is_text and total * fraction < 2:
        return _tails(rows, fraction, report)
    count = max(1, round(fraction * total))
    if count >= total:
        raise ConfigError(f"data.eval_fraction = {fraction} of {total} rows leaves no training row")
    chosen = _drawn(rows, rows.records, count, seed, "held out")
    return rows.some(np.setdiff1d(rows.records, chosen, assume_unique=True)), rows.some(chosen)


def _tails(rows: Conversations, fraction: float, report: DataReport) -> tuple[Conversations, Conversations]:
    """Hold out about the last `fraction` of each document: behind the next newline, if there is one."""
    bounds = []
    for _, text, *_ in rows.documents():
        place = round((1 - fraction) * len(text))
        after = text.find("\n", place) + 1
        bounds.append((0, after if 0 < after < len(text) else place, len(text)))
    report.notes.append(
        f"{len(rows.records):,} documents are too few to hold out whole ones: the last {fraction:.2%} of each is held "
        "out (it goes on where training stops, so its loss says little about other texts)"
    )
    sides, cuts = [], np.array(bounds, dtype=np.int64).reshape(-1, 3)
    for parts in (cuts[:, :2], cuts[:, 1:]):
        some = parts[:, 0] < parts[:, 1]  # of a document of a few characters one part is empty
        sides.append(rows.some(rows.records[some], parts[some]))
    return sides[0], sides[1]


def _drawn(rows: Conversations, records: Int64, count: int, seed: int, purpose: str) -> Int64:
    """Choose `count` of the records, those with the smallest hash of (seed, purpose, id); in file order."""
    if count == len(records):
        return records
    numbers = (stable_hash(seed, purpose, name) & (2**64 - 1) for name in rows.some(records).values("id"))
    hashes = np.fromiter(numbers, dtype=np.uint64, count=len(records))
    return np.sort(records[np.argsort(hashes, kind="stable")[:count]])


def report_overlap(train: Conversations, held_out: Conversations, report: DataReport) -> None:
    """Count the held-out rows whose content is also trained on."""
    if train.parts is not None:
        return  # parts of the same documents are on both sides, on purpose
    hashes, trained = (np.array(side.values("content"), dtype=np.uint64) for side in (held_out, train))
    for example in held_out.read(held_out.records[np.isin(hashes, trained)]):
        report.add("eval_in_train", f"{example.id} ({example.source})")
