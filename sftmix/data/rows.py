"""Rows -> checked conversations (or documents) with ids and a held-out split, without any tokenizer or model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError, DataError, refuse
from sftmix.common.progress import progress_bar
from sftmix.data.cache import cache_root, get_or_build, key_of
from sftmix.data.conversations import Conversations, ConversationWriter
from sftmix.data.documents import Documents, DocumentWriter, holds_text, read_documents
from sftmix.data.formats import TEXT, BadRow, convert, recognise
from sftmix.data.jsonrows import BadText, Row
from sftmix.data.report import DataReport
from sftmix.data.sides import Selection, divide, limited, report_overlap
from sftmix.data.sources import Source, expand
from sftmix.options import DataOptions, as_list
from sftmix.types import Rows

SHOWN = 20
"""Bad rows that an error message lists; the others are counted."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Checked rows, ready to be tokenised any number of times by `sftmix.data.masks`.

    train, eval  the two sides; eval is None without held-out rows
    text         the rows are documents of plain text
    packed       windows may hold several documents (data.packing)
    limit        windows to train on at most, of text (data.limit: of conversations it has done its work already)
    whole        a conversation is one example (data.multi_turn: whole), else one per assistant turn
    skip_bad     what cannot be used is dropped and counted, however much it is (data.skip_bad)
    root         the cache directory
    num_proc     processes that tokenise; None: as many as there are cores and work for
    report       rows read, dropped and named so far
    """

    train: Selection
    eval: Selection | None
    whole: bool
    skip_bad: bool
    root: Path
    report: DataReport
    text: bool = False
    packed: bool = False
    limit: int | None = None
    num_proc: int | None = None


def prepare(options: DataOptions, seed: int, *, progress: bool = True) -> Prepared:
    """Read, check and number all rows, and decide which are held out (by data.seed, or else by `seed`).

    Raises ConfigError for options that cannot be, DataError listing `file:line: reason` for the first bad rows and
    their number (unless data.skip_bad), or naming the file that cannot be read.
    """
    refuse(list(options.problems()), "the options of the rows")
    root = cache_root(options.cache_dir)
    train, report = _read(as_list(options.train), "data.train", options, root, progress)
    text, held_out = train.extents is not None, None
    _check_text_options(options, text)
    if options.eval is not None:
        held_out, more = _read(as_list(options.eval), "data.eval", options, root, progress)
        if text != (held_out.extents is not None):
            kinds = ("plain text", "conversations") if text else ("conversations", "plain text")
            raise DataError(f"data.train holds {kinds[0]} and data.eval {kinds[1]}: a run takes one kind of the two")
        report = report.merge([more])
    elif options.eval_fraction is not None:
        train, held_out = divide(train, options.eval_fraction, seed if options.seed is None else options.seed, report)
    if not text:
        train = limited(train, options.limit, report)
    if held_out is not None:
        report_overlap(train, held_out, report)
    whole, packed = options.multi_turn == "whole", text and options.packing is not False
    limit = options.limit if text else None
    return Prepared(train, held_out, whole, options.skip_bad, root, report, text, packed, limit, options.num_proc)


def _check_text_options(options: DataOptions, text: bool) -> None:
    """ConfigError for an option that has no meaning for plain text, or only for plain text; both are named."""
    if not text:
        if options.packing:
            raise ConfigError(
                f"data.packing is true, but data.format {options.format} gives conversations, which are never packed; "
                "set data.packing to null"
            )
        return
    if options.template is not None:
        raise ConfigError(
            f"data.template ({options.template}) and data.format text exclude each other: plain text has no turns; "
            "set data.template to null (the exported model keeps the template of its tokenizer)"
        )
    if options.num_proc not in (None, 1):
        raise ConfigError(
            f"data.num_proc ({options.num_proc}) and data.format text exclude each other: windows are cut from one "
            "document after the other, by the tokenizer's own threads; set data.num_proc to null"
        )
    if options.multi_turn != "per_turn":
        raise ConfigError(
            f"data.multi_turn ({options.multi_turn}) and data.format text exclude each other: plain text has no turns"
        )
    if options.label_field is not None and options.packing is not False:
        raise ConfigError(
            f"data.label_field ({options.label_field}) and packed text exclude each other: a window holds several "
            "documents; set data.packing to false"
        )


# ------------------------------------------------------------------------------------------ reading rows


def _read(
    names: list[str], option: str, options: DataOptions, root: Path, progress: bool
) -> tuple[Selection, DataReport]:
    """Checked rows of one side, from the cache when the files and options are the same."""
    label_field, labels = options.label_field, options.labels
    if option != "data.train":
        label_field = labels = None  # held-out rows need no quality label
    sources = expand(names, option, options.format, None if labels is None else as_list(labels))
    text = holds_text(sources, options.format, option)
    marks = label_field if labels is None else [source.label for source in sources]
    content = [[source.digest for source in sources], TEXT if text else options.format, marks]
    key = key_of("rows", content, [source.name for source in sources], options.skip_bad)
    form = TEXT if text else options.format

    def build(directory: Path) -> dict[str, Any]:
        return _write(directory, sources, option, form, label_field, options.skip_bad, progress).to_dict()

    directory, summary = get_or_build(root, f"rows-{key}", build)
    fingerprint, report = key_of("rows", content), DataReport(**summary)
    if not text:
        found = Conversations(directory)
        return Selection(found, found.valid, fingerprint, key), report
    documents = Documents(directory)
    extents = np.array([(0, documents.characters(record)) for record in documents.valid.tolist()], dtype=np.int64)
    return Selection(documents, documents.valid, fingerprint, key, extents), report


def _write(
    directory: Path,
    sources: list[Source],
    option: str,
    form: str,
    label_field: str | None,
    skip_bad: bool,
    progress: bool,
) -> DataReport:
    report, bad = DataReport(), BadRows()
    if form == TEXT:
        taken, repeated = _write_documents(directory, sources, label_field, progress, report, bad)
    else:
        taken, repeated = _write_conversations(directory, sources, form, label_field, progress, report, bad)
    stored = Conversations(directory)
    for record in taken.tolist():
        bad.add(stored.source(record), f"the id {stored.id_as_written(record)!r} is taken by an earlier row")
    for record in repeated.tolist():
        report.add("duplicate", f"{stored.id(record)} ({stored.source(record)})")
    bad.settle(report, skip_bad)
    if not len(stored.valid):
        raise DataError("\n".join([f"{option}: no usable row is left", *report.lines()]))
    return report


def _write_conversations(
    directory: Path,
    sources: list[Source],
    form: str,
    label_field: str | None,
    progress: bool,
    report: DataReport,
    bad: BadRows,
) -> tuple[Rows, Rows]:
    with ConversationWriter(directory) as writer:
        for row, found in _checked_rows(sources, form, label_field, progress):
            report.rows += 1
            if isinstance(found, BadRow):
                bad.add(row.source, str(found))
                continue
            turns = [place for place, m in enumerate(found.messages) if m.trained and m.content.strip()]
            for _ in range(sum(m.trained for m in found.messages) - len(turns)):
                report.add("empty_response", row.source)
            if turns:
                writer.add(found, row.source, turns)
    return writer.finish()


def _write_documents(
    directory: Path, sources: list[Source], label_field: str | None, progress: bool, report: DataReport, bad: BadRows
) -> tuple[Rows, Rows]:
    name = ""
    try:
        with DocumentWriter(directory) as writer:
            for name, about, pieces in read_documents(sources, label_field, progress):
                report.rows += 1
                try:
                    if isinstance(about, BadRow):
                        bad.add(name, str(about))
                    elif not writer.add(about, pieces, name):
                        report.add("empty_document", name)
                except BadText as problem:
                    bad.add(problem.source, problem.reason)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    return writer.finish()


def _checked_rows(
    sources: list[Source], form: str, label_field: str | None, progress: bool
) -> Iterator[tuple[Row, Any]]:
    """(row, its Conversation or the BadRow that says why not)."""
    with progress_bar("Reading rows", unit=" rows", delay=1, enabled=progress) as bar:
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
