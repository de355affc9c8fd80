"""Which rows: none of a list (data.exclude), repeated ones, and the held-out ones."""

from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.fields import RESERVED_ID
from sftmix.common.files import decoded
from sftmix.common.places import place_of
from sftmix.common.rng import stable_hash
from sftmix.common.shown import quoted
from sftmix.data.report import DataReport
from sftmix.data.store import Conversations
from sftmix.types import Bool


def exclude(rows: Conversations, path: str, report: DataReport) -> Conversations:
    """Leave out the rows that a file names, one in each line: an id (of a row or a turn) or `file:line`.

    Raises ConfigError for a file that cannot be read, and for a name that is no row's.
    """
    try:
        lines = decoded(place_of(path).read_bytes()).split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.exclude: {path} cannot be read: {error}") from error
    names = {RESERVED_ID.sub("", line.strip()) for line in lines} - {""}
    known = list(zip(rows.values("id"), rows.values("source"), strict=True))
    if unknown := sorted(names.difference(*known)):
        raise ConfigError(
            f"data.exclude: {path} names {len(unknown):,} that are no rows of data.train, such as "
            f"{quoted(unknown[0])}; give an id or file:line in each line, as `sftmix suspects` shows them"
        )
    named = np.array([not names.isdisjoint(pair) for pair in known])
    report_rows(rows, named, "excluded", report)
    return rows.some(rows.records[~named])


def repeated(rows: Conversations, report: DataReport, *, drop: bool = False) -> Conversations:
    """Count the rows with the turns and functions of an earlier row; `drop` leaves them out."""
    seen = set[tuple[Any, ...]]()
    again = np.zeros(len(rows.records), dtype=np.bool_)
    for k, content in enumerate(zip(rows.values("content"), rows.values("prompting"), strict=True)):
        again[k] = content in seen
        seen.add(content)
    report_rows(rows, again, "dropped_duplicate" if drop else "duplicate", report)
    return rows.some(rows.records[~again]) if drop else rows


def in_both(held_out: Conversations, train: Conversations, report: DataReport) -> None:
    """Count the held-out rows whose content is also among the training rows."""
    hashes, trained = (np.array(side.values("content"), dtype=np.uint64) for side in (held_out, train))
    report_rows(held_out, np.isin(hashes, trained), "eval_in_train", report)


def report_rows(rows: Conversations, marked: Bool, reason: str, report: DataReport) -> None:
    """Add the marked rows to a report, by their ids and places."""
    side = rows.some(rows.records[marked])
    for name, source in zip(side.values("id"), side.values("source"), strict=True):
        report.add(reason, f"{name} ({source})")


def divide(rows: Conversations, fraction: float, seed: int) -> tuple[Conversations, Conversations]:
    """Divide rows into (training side, held-out side), by the smallest hashes of (seed, id).

    Raises ConfigError if there are too few: of text, the share must be two documents, as they are few and long.
    """
    total = len(rows.records)
    count = max(1, round(fraction * total))
    if count >= total or (rows.is_text and total * fraction < 2):
        raise ConfigError(
            f"data.eval_fraction = {fraction} of {total} rows leaves no training row, or holds out less than two "
            "documents of text: name held-out rows, data.eval"
        )
    names = rows.values("id")
    hashes = np.fromiter((stable_hash(seed, "held out", name) & (2**64 - 1) for name in names), np.uint64)
    chosen = np.sort(rows.records[np.argsort(hashes, kind="stable")[:count]])
    return rows.some(np.setdiff1d(rows.records, chosen, assume_unique=True)), rows.some(chosen)
