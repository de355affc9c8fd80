"""The two sides of a data set: the rows that are trained on, and those that are held out."""

from __future__ import annotations

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.rng import stable_hash
from sftmix.data.conversations import Conversations
from sftmix.data.documents import Documents
from sftmix.data.report import DataReport
from sftmix.types import Int64


def first_rows(train: Conversations, limit: int | None, report: DataReport) -> Conversations:
    """The first `limit` rows; a note counts the others."""
    if limit is None or len(train.records) <= limit:
        return train
    report.notes.append(f"{len(train.records) - limit:,} training rows left out (data.limit)")
    return train.some(train.records[:limit])


def divide(rows: Conversations, fraction: float, seed: int, report: DataReport) -> tuple[Conversations, Conversations]:
    """(training side, held-out side): whole rows by hash; of fewer than 2 / fraction documents the last part of each.

    Windows of one document lie side by side: to hold out some of them would test on what stands between trained text.
    """
    if isinstance(rows, Documents) and len(rows.records) * fraction < 2:
        return _tails(rows, fraction, report)
    chosen = _held_out(rows, fraction, seed)
    return rows.some(np.setdiff1d(rows.records, chosen, assume_unique=True)), rows.some(chosen)


def _tails(rows: Documents, fraction: float, report: DataReport) -> tuple[Documents, Documents]:
    cuts = np.array([rows.tail(record, fraction) for record in rows.records.tolist()], dtype=np.int64)
    starts, ends = rows.parts.T
    first, last = cuts > 0, cuts < ends  # a document of a few characters stays whole
    if not first.any() or not last.any():
        raise ConfigError(f"data.eval_fraction = {fraction} leaves one side without text: the documents are too short")
    report.notes.append(
        f"{len(cuts):,} documents are too few to hold out whole ones: the last {fraction:.2%} of each is held out "
        "(it goes on where training stops, so its loss says little about other texts)"
    )
    train = rows.some_parts(rows.records[first], np.stack([starts, cuts], axis=1)[first])
    return train, rows.some_parts(rows.records[last], np.stack([cuts, ends], axis=1)[last])


def _held_out(rows: Conversations, fraction: float, seed: int) -> Int64:
    """round(fraction * N) records, at least one: those whose hash of (seed, id) is smallest."""
    total = len(rows.records)
    count = max(1, round(fraction * total))
    if count >= total:
        raise ConfigError(f"data.eval_fraction = {fraction} of {total} rows leaves no training row")
    ids = (rows.id(record) for record in rows.records.tolist())
    hashes = np.fromiter((stable_hash(seed, "held out", i) & (2**64 - 1) for i in ids), dtype=np.uint64, count=total)
    return np.sort(rows.records[np.argsort(hashes, kind="stable")[:count]])


def report_overlap(train: Conversations, held_out: Conversations, report: DataReport) -> None:
    """Count the held-out rows whose content is also trained on; the last parts of trained documents are not meant."""
    if train.file is held_out.file and np.isin(held_out.records, train.records).any():
        return
    seen = np.isin(held_out.content[held_out.records], train.content[train.records])
    for record in held_out.records[seen].tolist():
        report.add("eval_in_train", f"{held_out.id(record)} ({held_out.source(record)})")
