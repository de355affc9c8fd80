"""Rows -> checked conversations (or documents) with ids, without tokenizer or model.

Rows of data.exclude are left out, repeated rows are counted or dropped, and some are held out.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from sftmix.components.row_format import RowFormat
from sftmix.data.decisions import excluded_names
from sftmix.data.reading import RowReader
from sftmix.data.report import Case, DataReport
from sftmix.data.store import Conversations, Prepared
from sftmix.options.data import DataOptions
from sftmix.ranks.rng import stable_hash
from sftmix.text.examples import question_and_response
from sftmix.text.thoughts import TAGS, THOUGHT_FIELDS
from sftmix.types import Bool
from sftmix.words.errors import ConfigError, DataError, refuse
from sftmix.words.fields import TEXT, column_problems, listed
from sftmix.words.shown import quoted


def prepare(options: DataOptions, seed: int, row_format: RowFormat | None = None) -> Prepared:
    """Read, check and number all rows, and decide which are held out (by data.seed, or else by `seed`).

    row_format  None: rows are of data.format
    Raises ConfigError for options that exclude each other. Raises DataError for a file that cannot be read, and for bad
    rows unless data.skip_bad is set: the message counts them and lists `file:line: reason` of the first.
    """
    form = row_format or options.format
    refuse([*options.problems(), *column_problems(form, options.columns or {})], "the options of the rows")
    reader = RowReader("data.train", options, form)
    is_text = reader.form == TEXT
    if is_text:
        options = replace(options, format="text")
        refuse(list(options.problems()), "the options of the rows")
    elif options.packing:
        raise ConfigError("data.packing true is for plain text: conversations are never packed; set it to null")
    train, report = reader.read()
    thinking = _thinks(report, options)
    seed = seed if options.seed is None else options.seed
    if options.exclude is not None:
        train = exclude(train, options.exclude, report)
    train = repeated(train, report, drop=options.duplicates == "drop")
    held_out = None
    if options.eval is not None:
        reader = RowReader("data.eval", options, form)
        if (reader.form == TEXT) != is_text:
            raise DataError("data.train or data.eval holds plain text, the other conversations: a run takes one kind")
        held_out, more = reader.read()
        repeated(held_out, more)
        report.take(more)
    elif options.eval_fraction is not None:
        # Documents are few and long: a share of less than two would be chance.
        train, held_out = divide(train, options.eval_fraction, seed, least=2 if is_text else 0)
    # Behind the held-out rows, so that runs with several limits hold out the same.
    limit = options.limit
    # For text, data.limit counts windows; these are cut later, from the tokens.
    if limit is not None and not is_text and len(train.records) > limit:
        report.notes.append(f"no more than the first {limit:,} training rows are used (data.limit)")
        train = train.some(train.records[:limit])
    if held_out is not None:
        in_both(held_out, train, report)
    return Prepared(train, held_out, report, options, thinking)


def _thinks(report: DataReport, options: DataOptions) -> bool:
    """Return True if some row has a thought. Raises DataError if none has, and data.thoughts is not train."""
    found = "thought" in report.counts
    if options.thoughts != "train" and not found:
        raise DataError(
            f"data.thoughts is {options.thoughts}, and no row of data.train has a thought, in {listed(THOUGHT_FIELDS)} "
            f"of its turns or behind {listed(TAGS)} in their content: leave it out, or give thoughts in these forms"
        )
    return found


# ---------------------------------------------------------------------------------------------- which rows


def exclude(rows: Conversations, path: str, report: DataReport) -> Conversations:
    """Leave out the rows that a file names: a list, or a table with decisions (`excluded_names`).

    Raises ConfigError for a file that cannot be read, and for a name that is no row's.
    """
    places = rows.values("source")
    known = list(zip(rows.values("id"), places, strict=True))
    records = dict(zip(places, rows.records, strict=True))

    def said(place: str) -> list[tuple[str, str]]:
        """Return question and response of each answer of the row at a place."""
        return [question_and_response(one) for one in rows.some(np.array([records[place]])).examples(whole=False)]

    names, others = excluded_names(path, {name for pair in known for name in pair}, said)
    if others or not names:
        report.notes.append(f"data.exclude: {path} leaves out {f'whole rows{others}' if names else 'no row'}")
    if unknown := sorted(names.difference(*known)):
        raise ConfigError(
            f"data.exclude: {path} names {len(unknown):,} that are no rows of data.train, such as "
            f"{quoted(unknown[0])}: gone, or changed since? Give an id or file:line in each line, as `sftmix suspects` "
            "shows them"
        )
    named = np.array([not names.isdisjoint(pair) for pair in known])
    report_rows(rows, named, "excluded", report)
    return rows.some(rows.records[~named])


def repeated(rows: Conversations, report: DataReport, *, drop: bool = False) -> Conversations:
    """Count the rows with the turns and functions of an earlier row; `drop` leaves them out."""
    seen = set[tuple[Any, ...]]()
    again = np.zeros(len(rows.records), dtype=np.bool_)
    # prompting: the same question with other functions is another one.
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
        report.add(reason, Case(source, name))


def divide(rows: Conversations, fraction: float, seed: int, least: int) -> tuple[Conversations, Conversations]:
    """Divide rows into (training side, held-out side), by the smallest hashes of (seed, id).

    Raises ConfigError if no training row is left, or if the share is of fewer than `least` rows.
    """
    total = len(rows.records)
    count = max(1, round(fraction * total))
    if count >= total or total * fraction < least:
        raise ConfigError(
            f"data.eval_fraction = {fraction} of {total} rows leaves no training row, or holds out less than two "
            "documents of text: name held-out rows, data.eval"
        )
    # By ids: rows that are added, left out or moved change few sides.
    names = rows.values("id")
    hashes = np.fromiter((stable_hash(seed, "held out", name) & (2**64 - 1) for name in names), np.uint64)
    chosen = np.sort(rows.records[np.argsort(hashes, kind="stable")[:count]])
    return rows.some(np.setdiff1d(rows.records, chosen, assume_unique=True)), rows.some(chosen)
