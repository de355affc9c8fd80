"""Which rows: some of each source (data.take), none of a list (data.exclude), repeated ones, and the held-out ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError, DataError
from sftmix.common.files import decoded
from sftmix.common.places import place_of
from sftmix.common.plain import as_list
from sftmix.common.rng import stable_hash
from sftmix.common.shown import quoted
from sftmix.data.formats import RESERVED_ID
from sftmix.data.report import DataReport
from sftmix.data.store import Conversations
from sftmix.options import DataOptions
from sftmix.types import Int64


def take(
    rows: Conversations, options: DataOptions, written: Sequence[int], seed: int, report: DataReport
) -> Conversations:
    """Take some rows of each entry of data.train, those with the smallest hash of (seed, id); a note counts them.

    written  records of each entry, which follow one another
    Raises ConfigError for more rows than there are, and for a share that is no row.
    """
    chosen: list[Int64] = []
    notes: list[str] = []
    entries = np.split(rows.records, np.cumsum(written)[:-1])
    for size, name, records in zip(as_list(options.take), as_list(options.train), entries, strict=True):
        total = len(records)
        count = total if size is None else size if isinstance(size, int) else round(size * total)
        if size is not None and not 1 <= count <= total:
            raise ConfigError(
                f"data.take {size} of {name} is {count:,} of {total:,} usable rows; name a number from 1 to "
                f"{total:,}, or null for all of them"
            )
        chosen.append(_drawn(rows.some(records), count, seed, "take"))
        notes.append(f"{count:,} of {total:,} from {name}")
    report.notes.append(f"rows taken (data.take): {', '.join(notes)}")
    return rows.some(np.concatenate(chosen))


def exclude(rows: Conversations, path: str, whole: Conversations, report: DataReport) -> Conversations:
    """Leave out the rows that a file names, one in each line: an id (of a row or a turn) or `file:line`.

    whole  all rows of data.train, of which data.take has left `rows`
    Raises ConfigError for a file that cannot be read, and for a name that is no row's; DataError if no row is left.
    """
    try:
        lines = decoded(place_of(path).read_bytes()).split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.exclude: {path} cannot be read: {error}") from error
    names = {RESERVED_ID.sub("", line.strip()) for line in lines} - {""}
    known = list(zip(whole.values("id"), whole.values("source"), strict=True))
    if unknown := sorted(names.difference(*known)):
        raise ConfigError(
            f"data.exclude: {path} names {len(unknown):,} that are no rows of data.train, such as "
            f"{quoted(unknown[0])}; give an id or file:line in each line, as `sftmix suspects` shows them"
        )
    named = np.array([not names.isdisjoint(pair) for pair in known])
    for k in np.flatnonzero(named & np.isin(whole.records, rows.records)):
        report.add("excluded", f"{known[k][0]} ({known[k][1]})")
    left = rows.some(np.setdiff1d(rows.records, whole.records[named], assume_unique=True))
    if not len(left.records):
        raise DataError(f"data.exclude: {path} names every row that is left of data.train")
    return left


def repeated(rows: Conversations, report: DataReport, *, drop: bool = False) -> Conversations:
    """Count the rows with the turns, functions and template's variables of an earlier row; `drop` leaves them out."""
    seen = set[tuple[Any, ...]]()
    again = np.zeros(len(rows.records), dtype=np.bool_)
    columns = [rows.values(column) for column in ("content", "prompting", "id", "source")]
    for k, (*content, name, source) in enumerate(zip(*columns, strict=True)):
        again[k] = tuple(content) in seen
        seen.add(tuple(content))
        if again[k]:
            report.add("dropped_duplicate" if drop else "duplicate", f"{name} ({source})")
    return rows.some(rows.records[~again]) if drop else rows


def divide(rows: Conversations, fraction: float, seed: int, report: DataReport) -> tuple[Conversations, Conversations]:
    """Divide rows into (training side, held-out side): whole rows by their hash, or the last part of each document.

    With fewer than 2 / fraction documents, about the last part of each is held out, behind the next newline, if there
    is one. Windows from inside a document are not: the model would be tested on text between trained text.
    """
    total = len(rows.records)
    if not rows.is_text or total * fraction >= 2:
        count = max(1, round(fraction * total))
        if count >= total:
            raise ConfigError(f"data.eval_fraction = {fraction} of {total} rows leaves no training row")
        chosen = _drawn(rows, count, seed, "held out")
        return rows.some(np.setdiff1d(rows.records, chosen, assume_unique=True)), rows.some(chosen)
    report.notes.append(
        f"{total:,} documents are too few to hold out whole ones: the last {fraction:.2%} of each is held "
        "out (it goes on where training stops, so its loss says little about other texts)"
    )
    bounds = []
    for _, text, *_ in rows.documents():
        place = round((1 - fraction) * len(text))
        after = text.find("\n", place) + 1
        bounds.append((0, after if 0 < after < len(text) else place, len(text)))
    cuts = np.array(bounds, dtype=np.int64).reshape(-1, 3)
    sides: list[Conversations] = []
    for parts in (cuts[:, :2], cuts[:, 1:]):
        some = parts[:, 0] < parts[:, 1]  # of a document of a few characters one part is empty
        sides.append(rows.some(rows.records[some], parts[some]))
    return sides[0], sides[1]


def _drawn(rows: Conversations, count: int, seed: int, purpose: str) -> Int64:
    """Choose `count` of the records, those with the smallest hash of (seed, purpose, id); in file order."""
    if count == len(rows.records):
        return rows.records
    hashes = np.fromiter((stable_hash(seed, purpose, name) & (2**64 - 1) for name in rows.values("id")), np.uint64)
    return np.sort(rows.records[np.argsort(hashes, kind="stable")[:count]])
