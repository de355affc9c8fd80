"""The two sides of a data set: which rows are trained on and which are held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.rng import stable_hash
from sftmix.data.cache import key_of
from sftmix.data.conversations import Conversations
from sftmix.data.documents import Documents
from sftmix.data.report import DataReport
from sftmix.types import Rows


@dataclass(frozen=True, slots=True)
class Selection:
    """The conversations of one side: records i64[n] of `conversations`, in file order.

    fingerprint  hash of the rows' content, whatever the files are called
    cache_key    the same with the files' names, which the records cite as their source
    extents      of text: i64[n, 2], the characters [start, end) of each document that belong to this side; else None
    """

    conversations: Conversations
    records: Rows
    fingerprint: str
    cache_key: str
    extents: Rows | None = None


def select(side: Selection, records: Rows, extents: Rows | None = None) -> Selection:
    """Some of the records; of text, `extents` says which part of each (None: as they were)."""
    if extents is None and len(records) == len(side.records):
        return side
    numbers = [records] if extents is None else [records, extents.reshape(-1)]
    chosen = hashlib.sha256(np.concatenate(numbers).astype("<i8").tobytes()).hexdigest()
    if extents is None and side.extents is not None:
        extents = side.extents[np.searchsorted(side.records, records)]
    keys = key_of(side.fingerprint, chosen), key_of(side.cache_key, chosen)
    return Selection(side.conversations, records, *keys, extents)


def limited(train: Selection, limit: int | None, report: DataReport) -> Selection:
    """The first `limit` rows; a note counts the others."""
    if limit is None or len(train.records) <= limit:
        return train
    report.notes.append(f"{len(train.records) - limit:,} training rows left out (data.limit)")
    return select(train, train.records[:limit])


def divide(rows: Selection, fraction: float, seed: int, report: DataReport) -> tuple[Selection, Selection]:
    """(training side, held-out side): whole rows by hash; of fewer than 2 / fraction documents the last part of each.

    Windows of one document lie side by side: to hold out some of them would test on what stands between trained text.
    """
    if rows.extents is not None and len(rows.records) * fraction < 2:
        return _tails(rows, fraction, report)
    chosen = _held_out(rows, fraction, seed)
    return select(rows, np.setdiff1d(rows.records, chosen, assume_unique=True)), select(rows, chosen)


def _tails(rows: Selection, fraction: float, report: DataReport) -> tuple[Selection, Selection]:
    documents, extents = rows.conversations, rows.extents
    assert isinstance(documents, Documents)
    assert extents is not None
    cuts = np.array([documents.tail(record, fraction) for record in rows.records.tolist()], dtype=np.int64)
    first, last = cuts > 0, cuts < extents[:, 1]  # a document of a few characters stays whole
    if not first.any() or not last.any():
        raise ConfigError(f"data.eval_fraction = {fraction} leaves one side without text: the documents are too short")
    report.notes.append(
        f"{len(cuts):,} documents are too few to hold out whole ones: the last {fraction:.2%} of each is held out "
        "(it goes on where training stops, so its loss says little about other texts)"
    )
    ends = np.stack([np.zeros_like(cuts), cuts, extents[:, 1]], axis=1)
    train, held_out = (select(rows, rows.records[k], ends[k, at : at + 2]) for at, k in enumerate((first, last)))
    return train, held_out


def _held_out(side: Selection, fraction: float, seed: int) -> Rows:
    """round(fraction * N) conversations, at least one: those whose hash of (seed, id) is smallest."""
    total = len(side.records)
    count = max(1, round(fraction * total))
    if count >= total:
        raise ConfigError(f"data.eval_fraction = {fraction} of {total} rows leaves no training row")
    ids = (side.conversations.id(record) for record in side.records.tolist())
    hashes = np.fromiter((stable_hash(seed, "held out", i) & (2**64 - 1) for i in ids), dtype=np.uint64, count=total)
    return np.sort(side.records[np.argsort(hashes, kind="stable")[:count]])


def report_overlap(train: Selection, held_out: Selection, report: DataReport) -> None:
    """Count the held-out rows whose content is also trained on; the last parts of trained documents are not meant."""
    same_store = train.conversations is held_out.conversations
    if same_store and np.isin(held_out.records, train.records).any():
        return
    seen = np.isin(held_out.conversations.content[held_out.records], train.conversations.content[train.records])
    for record in held_out.records[seen].tolist():
        name = held_out.conversations.id(record)
        report.add("eval_in_train", f"{name} ({held_out.conversations.source(record)})")
