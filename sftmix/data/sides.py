"""Which rows are used, and on which side: some of each source (data.take), held-out rows, and a limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.figures import counted
from sftmix.common.rng import stable_hash
from sftmix.data.conversations import Conversations
from sftmix.data.report import DataReport
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
    written  records of each entry, which stand one after the other
    Raises ConfigError for more rows than there are, and for a share that is no row.
    """
    chosen, notes, start = [], [], 0
    for size, name, total in zip(sizes, names, written, strict=True):
        records = np.arange(start, start + total)
        start += total
        count = total if size is None else size if isinstance(size, int) else round(size * total)
        if count > total or (size is not None and count < 1):
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
    names = {re.sub(r"@turn\d+$", "", line): line for line in map(str.strip, lines) if line}
    known = list(zip(rows.values("id"), rows.values("source"), strict=True))
    every = {*chain(*known)}
    if unknown := [line for name, line in names.items() if name not in every]:
        raise ConfigError(
            f"data.exclude: {path} names {counted(len(unknown), 'row')} that data.train does not have, first "
            f"{unknown[0]!r}; give an id or file:line in each line, as `sftmix suspects` shows them"
        )
    remaining = np.array([names.keys().isdisjoint(pair) for pair in known])
    for k in np.flatnonzero(~remaining).tolist():
        report.add("excluded", f"{known[k][0]} ({known[k][1]})")
    if not remaining.any():
        raise ConfigError(f"data.exclude: {path} names all rows, so none is left")
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
    first, last = [], []
    for record, (_, text, *_) in zip(rows.records.tolist(), rows.documents(), strict=True):
        place = round((1 - fraction) * len(text))
        after = text.find("\n", place) + 1
        cut = after if 0 < after < len(text) else place
        if cut > 0:  # a document of a few characters stays whole
            first.append((record, 0, cut))
        if cut < len(text):
            last.append((record, cut, len(text)))
    if not first or not last:
        raise ConfigError(f"data.eval_fraction = {fraction} leaves one side without text: the documents are too short")
    report.notes.append(
        f"{len(rows.records):,} documents are too few to hold out whole ones: the last {fraction:.2%} of each is held "
        "out (it goes on where training stops, so its loss says little about other texts)"
    )
    train, held_out = np.array(first), np.array(last)
    return rows.some(train[:, 0], train[:, 1:]), rows.some(held_out[:, 0], held_out[:, 1:])


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
