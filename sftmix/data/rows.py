"""Rows -> checked conversations with ids and a held-out split. No tokenizer and no model is needed for it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sftmix.data.cache import cache_root, get_or_build, key_of
from sftmix.data.conversations import Conversations, ConversationWriter
from sftmix.data.formats import BadRow, convert, recognise
from sftmix.data.jsonrows import Row
from sftmix.data.report import DataReport
from sftmix.data.sources import Source, expand
from sftmix.errors import ConfigError, DataError
from sftmix.options import DataOptions, as_list
from sftmix.rng import stable_hash
from sftmix.types import Rows

SHOWN = 20
"""Bad rows that an error message lists; the others are counted."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The conversations of one side: records i64[n] of `conversations`, in file order.

    fingerprint  hash of the rows' content, whatever the files are called
    cache_key    the same with the files' names, which the records cite as their source
    """

    conversations: Conversations
    records: Rows
    fingerprint: str
    cache_key: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """Checked rows, ready to be tokenised any number of times by `sftmix.data.masks`.

    train, eval  the two sides; eval is None without held-out rows
    whole        a conversation is one example (data.multi_turn: whole), else one per assistant turn
    skip_bad     what cannot be used is dropped and counted, however much it is (data.skip_bad)
    root         the cache directory
    report       rows read, dropped and named so far
    """

    train: Selection
    eval: Selection | None
    whole: bool
    skip_bad: bool
    root: Path
    report: DataReport


def prepare(options: DataOptions, seed: int, *, progress: bool = True) -> Prepared:
    """Read, check and number all rows, and decide which are held out (by data.seed, or else by `seed`).

    Raises ConfigError for options that cannot be, DataError listing `file:line: reason` for the first bad rows and
    their number (unless data.skip_bad), or naming the file that cannot be read.
    """
    _check_options(options)
    root = cache_root(options.cache_dir)
    rows, report = _conversations(as_list(options.train), "data.train", options, root, progress)
    train, held_out = rows.records, None
    if options.eval is not None:
        held_out, more = _conversations(as_list(options.eval), "data.eval", options, root, progress)
        report = report.merge([more])
    elif options.eval_fraction is not None:
        chosen = _held_out(rows, options.eval_fraction, seed if options.seed is None else options.seed)
        train = np.setdiff1d(train, chosen, assume_unique=True)
        held_out = _select(rows, chosen)
    train_side = _select(rows, train[: options.limit])
    if options.limit is not None and len(train) > options.limit:
        report.notes.append(f"{len(train) - options.limit:,} training rows left out (data.limit)")
    if held_out is not None:
        _report_overlap(train_side, held_out, report)
    return Prepared(train_side, held_out, options.multi_turn == "whole", options.skip_bad, root, report)


def _check_options(options: DataOptions) -> None:
    if not options.train:
        raise ConfigError("data.train is empty: name files, directories or hub ids of training rows")
    if options.eval is not None and options.eval_fraction is not None:
        raise ConfigError("data.eval and data.eval_fraction exclude each other: name held-out files, or a fraction")
    if options.eval is not None and not options.eval:
        raise ConfigError("data.eval is an empty list: name files of held-out rows, or null for none")
    if options.eval_fraction is not None and not 0 < options.eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction must be above 0 and below 1, not {options.eval_fraction}")
    if problem := options.label_problem():
        raise ConfigError(problem)
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"data.limit must be at least 1, not {options.limit}")


# ------------------------------------------------------------------------------------------ reading rows


def _conversations(
    names: list[str], option: str, options: DataOptions, root: Path, progress: bool
) -> tuple[Selection, DataReport]:
    """Checked conversations of one side, from the cache when the files and options are the same."""
    label_field, labels = options.label_field, options.labels
    if option != "data.train":
        label_field = labels = None  # held-out rows need no quality label
    sources = expand(names, option, None if labels is None else as_list(labels))
    marks = label_field if labels is None else [source.label for source in sources]
    content = [[source.digest for source in sources], options.format, marks]
    key = key_of("rows", content, [source.name for source in sources], options.skip_bad)

    def build(directory: Path) -> dict[str, Any]:
        return _write(directory, sources, option, options, label_field, progress).to_dict()

    directory, summary = get_or_build(root, f"rows-{key}", build)
    found = Conversations(directory)
    return Selection(found, found.valid, key_of("rows", content), key), DataReport(**summary)


def _write(
    directory: Path,
    sources: list[Source],
    option: str,
    options: DataOptions,
    label_field: str | None,
    progress: bool,
) -> DataReport:
    report, bad = DataReport(), BadRows()
    with ConversationWriter(directory) as writer:
        for row, found in _checked_rows(sources, options.format, label_field, progress):
            report.rows += 1
            if isinstance(found, BadRow):
                bad.add(row.source, str(found))
                continue
            turns = [place for place, m in enumerate(found.messages) if m.trained and m.content.strip()]
            for _ in range(sum(m.trained for m in found.messages) - len(turns)):
                report.add("empty_response", row.source)
            if turns:
                writer.add(found, row.source, turns)
    taken, repeated = writer.finish()
    stored = Conversations(directory)
    for record in taken.tolist():
        bad.add(stored.source(record), f"the id {stored.id_as_written(record)!r} is taken by an earlier row")
    for record in repeated.tolist():
        report.add("duplicate", f"{stored.id(record)} ({stored.source(record)})")
    bad.settle(report, options.skip_bad)
    if not len(stored.valid):
        raise DataError("\n".join([f"{option}: no usable row is left", *report.lines()]))
    return report


def _checked_rows(
    sources: list[Source], form: str, label_field: str | None, progress: bool
) -> Iterator[tuple[Row, Any]]:
    """(row, its Conversation or the BadRow that says why not)."""
    with tqdm(desc="Reading rows", unit=" rows", delay=1, disable=not progress, file=sys.stderr) as bar:
        for source in sources:
            name = None if form == "auto" else form
            for row in _readable(source):
                bar.update()
                try:
                    if row.problem is not None:
                        raise BadRow(row.problem)
                    if form == "auto" and isinstance(row.value, dict):
                        name = recognise(row.value, name)
                    found = convert(row.value, name or "messages", label_field)
                    yield row, found if source.label is None else replace(found, label=source.label)
                except BadRow as problem:
                    yield row, problem


def _readable(source: Source) -> Iterator[Row]:
    try:
        yield from source.rows()
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from error


class BadRows:
    """Collects bad rows: the first SHOWN with their reasons, and the count."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, source: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{source}: {reason}")

    def settle(self, report: DataReport, skip_bad: bool) -> None:
        """Count the bad rows into the report, or raise DataError when they may not be skipped."""
        if self.count and not skip_bad:
            more = [f"... and {self.count - len(self.first):,} more"] if self.count > len(self.first) else []
            head = f"{self.count:,} bad row{'s' if self.count > 1 else ''} (data.skip_bad drops and counts them):"
            raise DataError("\n".join([head, *self.first, *more]))
        for line in self.first:
            report.add("bad_row", line)
        if self.count:
            report.counts["bad_row"] = self.count


# --------------------------------------------------------------------------------------- the held-out split


def _select(side: Selection, records: Rows) -> Selection:
    if len(records) == len(side.records):
        return side
    chosen = hashlib.sha256(records.astype("<i8").tobytes()).hexdigest()
    return Selection(side.conversations, records, key_of(side.fingerprint, chosen), key_of(side.cache_key, chosen))


def _held_out(side: Selection, fraction: float, seed: int) -> Rows:
    """round(fraction * N) conversations, at least one: those whose hash of (seed, id) is smallest."""
    total = len(side.records)
    count = max(1, round(fraction * total))
    if count >= total:
        raise ConfigError(f"data.eval_fraction = {fraction} of {total} rows leaves no training row")
    ids = (side.conversations.id(record) for record in side.records.tolist())
    hashes = np.fromiter((stable_hash(seed, "held out", i) & (2**64 - 1) for i in ids), dtype=np.uint64, count=total)
    return np.sort(side.records[np.argsort(hashes, kind="stable")[:count]])


def _report_overlap(train: Selection, held_out: Selection, report: DataReport) -> None:
    seen = np.isin(held_out.conversations.content[held_out.records], train.conversations.content[train.records])
    for record in held_out.records[seen].tolist():
        name = held_out.conversations.id(record)
        report.add("eval_in_train", f"{name} ({held_out.conversations.source(record)})")
