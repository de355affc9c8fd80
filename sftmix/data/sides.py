"""Which rows are used, and on which side: some of each source (data.take), held-out rows, and a limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.rng import stable_hash
from sftmix.data.conversations import Conversations
from sftmix.data.documents import Documents
from sftmix.data.report import HELD_OUT_BEFORE, DataReport
from sftmix.options import DataOptions
from sftmix.types import Int64


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
    written  records of each entry, which stand one after the other; some of them may not be among `rows`
    Raises ConfigError for more rows than there are, and for a share that is no row.
    """
    entry = np.searchsorted(np.cumsum(written), rows.records, side="right")
    chosen, notes = [], []
    for place, (size, name) in enumerate(zip(sizes, names, strict=True)):
        there = rows.records[entry == place]
        count = len(there) if size is None else size if isinstance(size, int) else round(size * len(there))
        if count > len(there) or (size is not None and count < 1):
            raise ConfigError(
                f"data.take {size} of {name} is {count:,} of {len(there):,} usable rows; name a number from 1 to "
                f"{len(there):,}, or null for all of them"
            )
        chosen.append(_drawn(rows, there, count, seed, "take"))
        notes.append(f"{count:,} of {len(there):,} from {name}")
    report.notes.append(f"rows taken (data.take): {', '.join(notes)}")
    return rows.some(np.concatenate(chosen))


def first_rows(
    train: Conversations, options: DataOptions, held_out: Conversations | None, report: DataReport
) -> Conversations:
    """The first `data.limit` rows; a note counts the others.

    held_out  None, or the rows that were held out of these before (data.eval_fraction)
    """
    limit = options.limit
    if limit is None or len(train.records) <= limit:
        return train
    left_out = f"{len(train.records) - limit:,} training rows left out (data.limit)"
    report.notes.append(left_out if held_out is None else f"{left_out}; {HELD_OUT_BEFORE}")
    if held_out is not None:
        report.notes += too_many_held_out(options, len(held_out.records), "rows")
    return train.some(train.records[:limit])


def too_many_held_out(options: DataOptions, held_out: int, unit: Literal["rows", "windows"]) -> list[str]:
    """Return a note if more is held out than the `data.limit` rows (or windows of text) that are trained on.

    held_out  rows (windows) that data.eval_fraction held out before the limit
    """
    limit, fraction = options.limit, options.eval_fraction
    if limit is None or fraction is None or held_out <= limit:
        return []
    return [
        f"{held_out:,} {unit} are held out beside {limit:,} to train on, and every evaluation reads them: data.limit "
        f"cuts the training {unit} alone, after data.eval_fraction {fraction:g}; a smaller share keeps that in "
        "proportion, and so does data.take in place of data.limit"
    ]


def divide(rows: Conversations, fraction: float, seed: int, report: DataReport) -> tuple[Conversations, Conversations]:
    """Divide rows into (training side, held-out side): whole rows by their hash, or the last part of each document.

    With fewer than 2 / fraction documents, the last part of each is held out. Windows from inside a document are not:
    the model would be tested on text that stands between trained text.
    """
    if isinstance(rows, Documents) and len(rows.records) * fraction < 2:
        return _tails(rows, fraction, report)
    total = len(rows.records)
    count = max(1, round(fraction * total))
    if count >= total:
        raise ConfigError(f"data.eval_fraction = {fraction} of {total} rows leaves no training row")
    chosen = _drawn(rows, rows.records, count, seed, "held out")
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


def _drawn(rows: Conversations, records: Int64, count: int, seed: int, purpose: str) -> Int64:
    """Choose `count` of the records, those with the smallest hash of (seed, purpose, id); in file order."""
    if count == len(records):
        return records
    numbers = (stable_hash(seed, purpose, rows.id(record)) & (2**64 - 1) for record in records.tolist())
    hashes = np.fromiter(numbers, dtype=np.uint64, count=len(records))
    return np.sort(records[np.argsort(hashes, kind="stable")[:count]])


def report_overlap(train: Conversations, held_out: Conversations, report: DataReport) -> None:
    """Count the held-out rows whose content is also trained on."""
    if train.file is held_out.file and np.isin(held_out.records, train.records).any():
        return  # parts of the same documents are on both sides, on purpose
    seen = np.isin(held_out.content[held_out.records], train.content[train.records])
    for record in held_out.records[seen].tolist():
        report.add("eval_in_train", f"{held_out.id(record)} ({held_out.source(record)})")
