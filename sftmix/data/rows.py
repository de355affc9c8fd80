"""Rows -> checked conversations (or documents) with ids, for training and held out. No tokenizer or model is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError, DataError, refuse
from sftmix.common.progress import progress_bar
from sftmix.common.rng import stable_hash
from sftmix.data.columns import Columns
from sftmix.data.conversations import Conversations, ConversationWriter, content_hash
from sftmix.data.documents import Documents, DocumentWriter
from sftmix.data.formats import TEXT, convert, document, recognise
from sftmix.data.jsonrows import BadRow
from sftmix.data.report import BadRows, DataReport
from sftmix.data.sources import Source, expand, holds_text
from sftmix.data.store import cache_root, get_or_build, key_of
from sftmix.options import DataOptions, as_list
from sftmix.types import Example, Int64


@dataclass(frozen=True, slots=True)
class Prepared:
    """Checked rows, ready to be tokenised any number of times by `sftmix.data.encode`.

    train, eval  the two sides; eval is None without held-out rows
    report       rows read, dropped and named so far
    options      the options under which the rows were read
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

    Raises ConfigError for options that exclude each other. Raises DataError for a file that cannot be read, and for bad
    rows unless data.skip_bad is set: the message counts them and lists `file:line: reason` of the first.
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
        train, held_out = _divide(train, options.eval_fraction, seed if options.seed is None else options.seed, report)
    if not text:  # for text, data.limit counts windows; these are cut later, from the tokens
        train = _first_rows(train, options.limit, report)
    if held_out is not None:
        _report_overlap(train, held_out, report)
    return Prepared(train, held_out, report, replace(options))


def _check_text_options(options: DataOptions, text: bool) -> None:
    """Raise ConfigError for an option that does not fit the kind of the rows, plain text (`text`) or conversations."""
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
    """Checked rows of one side; from the cache if the files and the options are the same as before."""
    names, label_field, labels = options.train, options.label_field, options.labels
    if option != "data.train":
        names, label_field, labels = options.eval or [], None, None  # held-out rows need no quality label
    sources = expand(as_list(names), option, options.format, None if labels is None else as_list(labels))
    columns = Columns(options.columns)
    form = TEXT if holds_text(sources, options.format, option, columns) else options.format
    marks = label_field if labels is None else [source.label for source in sources]
    content = [[source.digest for source in sources], form, marks, *([columns.names] if columns.names else [])]
    key = key_of("rows", content, [source.name for source in sources], options.skip_bad)

    def build(directory: Path) -> dict[str, Any]:
        report, bad = DataReport(), BadRows()
        _write(directory, sources, form, columns, label_field, report, bad, progress)
        columns.check(option, own_names=option != "data.train")
        bad.settle(report, options.skip_bad, f"data.columns: {columns}" if columns.names else "")
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
    columns: Columns,
    label_field: str | None,
    report: DataReport,
    bad: BadRows,
    progress: bool,
) -> None:
    """Store the usable rows of all sources, count and name the others."""
    writer = DocumentWriter(directory) if form == TEXT else ConversationWriter(directory)
    unit = "documents" if form == TEXT else "rows"
    label_field = columns.label_field(label_field)
    with writer, progress_bar(f"Reading {unit}", unit=f" {unit}", delay=1, enabled=progress) as bar:
        for source in sources:
            name = _usual(form, columns)
            for place, found in source.rows():
                row = found if source.is_text else columns.renamed(found)
                bar.update()
                report.rows += 1
                try:
                    if isinstance(row, BadRow):
                        raise row
                    if isinstance(writer, DocumentWriter):
                        if not writer.add(*document(row, source=place, label_field=label_field)):
                            report.add("empty_document", place)
                        continue
                    if form == "auto" and isinstance(row, dict):
                        name = recognise(row, name, columns.formats)
                    usual = name or "messages"
                    _add(writer, convert(row, usual, source=place, label=source.label, label_field=label_field), report)
                except BadRow as problem:
                    bad.add(problem.source or place, str(problem))
    taken, repeated = writer.finish()
    stored = Conversations(directory)
    for record in taken.tolist():
        bad.add(stored.source(record), f"the id {stored.id_as_written(record)!r} is taken by an earlier row")
    for record in repeated.tolist():
        report.add("duplicate", f"{stored.id(record)} ({stored.source(record)})")


def _usual(form: str, columns: Columns) -> str | None:
    """Return the format of rows that have too few fields to recognise one; None if data.format and columns leave it."""
    if form != "auto":
        return form
    return columns.formats[0] if len(columns.formats) == 1 else None


def _add(writer: ConversationWriter, example: Example, report: DataReport) -> None:
    """Store a conversation with the turns that have a response; count the empty responses."""
    trained = [place for place, message in enumerate(example.messages) if message.trained]
    turns = [place for place in trained if example.messages[place].content.strip()]
    for _ in range(len(trained) - len(turns)):
        report.add("empty_response", example.source)
    if turns:
        writer.add(example, turns, content_hash(example.messages))


# ------------------------------------------------------------------------------------------- the two sides


def _first_rows(train: Conversations, limit: int | None, report: DataReport) -> Conversations:
    """The first `limit` rows; a note counts the others."""
    if limit is None or len(train.records) <= limit:
        return train
    report.notes.append(f"{len(train.records) - limit:,} training rows left out (data.limit)")
    return train.some(train.records[:limit])


def _divide(rows: Conversations, fraction: float, seed: int, report: DataReport) -> tuple[Conversations, Conversations]:
    """Divide rows into (training side, held-out side): whole rows by their hash, or the last part of each document.

    With fewer than 2 / fraction documents, the last part of each is held out. Windows from inside a document are not:
    the model would be tested on text that stands between trained text.
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
    """Choose round(fraction * N) records, at least one: those with the smallest hash of (seed, id)."""
    total = len(rows.records)
    count = max(1, round(fraction * total))
    if count >= total:
        raise ConfigError(f"data.eval_fraction = {fraction} of {total} rows leaves no training row")
    ids = (rows.id(record) for record in rows.records.tolist())
    hashes = np.fromiter((stable_hash(seed, "held out", i) & (2**64 - 1) for i in ids), dtype=np.uint64, count=total)
    return np.sort(rows.records[np.argsort(hashes, kind="stable")[:count]])


def _report_overlap(train: Conversations, held_out: Conversations, report: DataReport) -> None:
    """Count the held-out rows whose content is also trained on."""
    if train.file is held_out.file and np.isin(held_out.records, train.records).any():
        return  # parts of the same documents are on both sides, on purpose
    seen = np.isin(held_out.content[held_out.records], train.content[train.records])
    for record in held_out.records[seen].tolist():
        report.add("eval_in_train", f"{held_out.id(record)} ({held_out.source(record)})")
