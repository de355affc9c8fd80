"""Rows -> checked conversations (or documents) with ids and a held-out split, without any tokenizer or model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, DataError, refuse
from sftmix.common.progress import progress_bar
from sftmix.data.cache import cache_root, get_or_build, key_of
from sftmix.data.conversations import Conversations, ConversationWriter, content_hash
from sftmix.data.documents import Documents, DocumentWriter, holds_text
from sftmix.data.formats import TEXT, convert, document, recognise
from sftmix.data.jsonrows import BadRow
from sftmix.data.report import DataReport
from sftmix.data.sides import divide, first_rows, report_overlap
from sftmix.data.sources import Source, expand
from sftmix.options import DataOptions, as_list
from sftmix.types import Example

SHOWN = 20
"""Bad rows that an error message lists; the others are counted."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Checked rows, ready to be tokenised any number of times by `sftmix.data.encode`.

    train, eval  the two sides; eval is None without held-out rows
    report       rows read, dropped and named so far
    options      what they were read under
    """

    train: Conversations
    eval: Conversations | None
    report: DataReport
    options: DataOptions

    @property
    def text(self) -> bool:
        """The rows are documents of plain text."""
        return isinstance(self.train, Documents)


def prepare(options: DataOptions, seed: int, *, progress: bool = True) -> Prepared:
    """Read, check and number all rows, and decide which are held out (by data.seed, or else by `seed`).

    Raises ConfigError for options that cannot be, DataError listing `file:line: reason` for the first bad rows and
    their number (unless data.skip_bad), or naming the file that cannot be read.
    """
    refuse(list(options.problems()), "the options of the rows")
    train, report = _read("data.train", options, progress)
    text, held_out = isinstance(train, Documents), None
    _check_text_options(options, text)
    if options.eval is not None:
        held_out, more = _read("data.eval", options, progress)
        if text != isinstance(held_out, Documents):
            kinds = ("plain text", "conversations") if text else ("conversations", "plain text")
            raise DataError(f"data.train holds {kinds[0]} and data.eval {kinds[1]}: a run takes one kind of the two")
        report = report.merge([more])
    elif options.eval_fraction is not None:
        train, held_out = divide(train, options.eval_fraction, seed if options.seed is None else options.seed, report)
    if not text:  # of text, data.limit counts windows, which come to be with the tokens
        train = first_rows(train, options.limit, report)
    if held_out is not None:
        report_overlap(train, held_out, report)
    return Prepared(train, held_out, report, replace(options))


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
    if options.labels is not None:
        raise ConfigError(
            f"data.labels ({', '.join(as_list(options.labels))}) and data.format text exclude each other: documents "
            "take a label from a field of their row (data.label_field, with data.packing false); set it to null"
        )
    if options.label_field is not None and options.packing is not False:
        raise ConfigError(
            f"data.label_field ({options.label_field}) and packed text exclude each other: a window holds several "
            "documents; set data.packing to false"
        )


# ------------------------------------------------------------------------------------------ reading rows


def _read(option: str, options: DataOptions, progress: bool) -> tuple[Conversations, DataReport]:
    """Checked rows of one side, from the cache when the files and options are the same."""
    names, label_field, labels = options.train, options.label_field, options.labels
    if option != "data.train":
        names, label_field, labels = options.eval or [], None, None  # held-out rows need no quality label
    sources = expand(as_list(names), option, options.format, None if labels is None else as_list(labels))
    form = TEXT if holds_text(sources, options.format, option) else options.format
    marks = label_field if labels is None else [source.label for source in sources]
    content = [[source.digest for source in sources], form, marks]
    key = key_of("rows", content, [source.name for source in sources], options.skip_bad)

    def build(directory: Path) -> dict[str, Any]:
        report, bad = DataReport(), BadRows()
        _write(directory, sources, form, label_field, report, bad, progress)
        bad.settle(report, options.skip_bad)
        if not len(Conversations(directory).records):
            raise DataError("\n".join([f"{option}: no usable row is left", *report.lines()]))
        return report.to_dict()

    directory, summary = get_or_build(cache_root(options.cache_dir), f"rows-{key}", build)
    kind = Documents if form == TEXT else Conversations
    return kind(directory, key_of("rows", content), key), DataReport(**summary)


def _write(
    directory: Path,
    sources: list[Source],
    form: str,
    label_field: str | None,
    report: DataReport,
    bad: BadRows,
    progress: bool,
) -> None:
    """Store the usable rows of all sources, count and name the others."""
    writer = DocumentWriter(directory) if form == TEXT else ConversationWriter(directory)
    unit = "documents" if form == TEXT else "rows"
    with writer, progress_bar(f"Reading {unit}", unit=f" {unit}", delay=1, enabled=progress) as bar:
        for source in sources:
            name = None if form == "auto" else form
            for place, row in source.rows():
                bar.update()
                report.rows += 1
                try:
                    if isinstance(row, BadRow):
                        raise row
                    if isinstance(writer, DocumentWriter):
                        example, text = document(row, label_field)
                        _add_document(writer, replace(example, source=place), text, report)
                        continue
                    if form == "auto" and isinstance(row, dict):
                        name = recognise(row, name)
                    example = convert(row, name or "messages", label_field)
                    label = example.label if source.label is None else source.label
                    _add_conversation(writer, replace(example, source=place, label=label), report)
                except BadRow as problem:
                    bad.add(problem.source or place, str(problem))
    taken, repeated = writer.finish()
    stored = Conversations(directory)
    for record in taken.tolist():
        bad.add(stored.source(record), f"the id {stored.id_as_written(record)!r} is taken by an earlier row")
    for record in repeated.tolist():
        report.add("duplicate", f"{stored.id(record)} ({stored.source(record)})")


def _add_document(writer: DocumentWriter, example: Example, text: Iterable[str], report: DataReport) -> None:
    if not writer.add(example, text):
        report.add("empty_document", example.source)


def _add_conversation(writer: ConversationWriter, example: Example, report: DataReport) -> None:
    trained = [place for place, message in enumerate(example.messages) if message.trained]
    turns = [place for place in trained if example.messages[place].content.strip()]
    for _ in range(len(trained) - len(turns)):
        report.add("empty_response", example.source)
    if turns:
        writer.add(example, turns, content_hash(example.messages))


class BadRows:
    """The first SHOWN bad rows with their reasons, and the count of all."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, source: str, reason: str) -> None:
        """Count one, which stands at `source` (`file:line`)."""
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
