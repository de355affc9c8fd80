"""Rows -> checked conversations (or documents) with ids, for training and held out. No tokenizer or model is needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, DataError, refuse
from sftmix.common.progress import progress_bar
from sftmix.common.shown import quoted
from sftmix.data.columns import Columns
from sftmix.data.conversations import Conversations, ConversationWriter, content_hash
from sftmix.data.documents import Documents, DocumentWriter
from sftmix.data.formats import TEXT, convert, document, recognise
from sftmix.data.jsonrows import BadRow
from sftmix.data.report import BadFile, BadRows, DataReport
from sftmix.data.sides import divide, first_rows, report_overlap, take
from sftmix.data.sources import Source, expand, holds_text, left_out
from sftmix.data.store import cache_root, get_or_build, key_of
from sftmix.options import DataOptions, as_list
from sftmix.types import Example


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
    train, report, written = _read("data.train", options, progress)
    text, held_out = isinstance(train, Documents), None
    _check_text_options(options, text)
    seed = seed if options.seed is None else options.seed
    if options.take is not None:
        train = take(train, as_list(options.take), as_list(options.train), written, seed, report)
    if options.eval is not None:
        held_out, more, _ = _read("data.eval", options, progress)
        if text != isinstance(held_out, Documents):
            kinds = ("plain text", "conversations") if text else ("conversations", "plain text")
            raise DataError(f"data.train holds {kinds[0]} and data.eval {kinds[1]}: a run takes one kind of the two")
        report = report.merge([more])
    elif options.eval_fraction is not None:
        train, held_out = divide(train, options.eval_fraction, seed, report)
    if not text:  # for text, data.limit counts windows; these are cut later, from the tokens
        train = first_rows(train, options, None if options.eval_fraction is None else held_out, report)
    if held_out is not None:
        report_overlap(train, held_out, report)
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
    no_turns = "plain text has no turns"
    reasons = {
        "template": f"{no_turns}; set data.template to null (the exported model keeps the template of its tokenizer)",
        "num_proc": "windows are cut from one document after the other, by the tokenizer's own threads; set "
        "data.num_proc to null",
        "multi_turn": f"{no_turns}; set data.multi_turn to per_turn",
        "labels": "documents take a label from a field of their row (data.label_field, with data.packing false); set "
        "it to null",
    }
    for option, reason in reasons.items():
        value = getattr(options, option)
        if value not in (None, "per_turn") and (option, value) != ("num_proc", 1):
            shown = value if isinstance(value, (str, int)) else ", ".join(value)
            raise ConfigError(f"data.{option} ({shown}) and data.format text exclude each other: {reason}")
    if options.label_field is not None and options.packing is not False:
        raise ConfigError(
            f"data.label_field ({options.label_field}) and packed text exclude each other: a window holds several "
            "documents; set data.packing to false"
        )


# ------------------------------------------------------------------------------------------ reading rows


def _read(option: str, options: DataOptions, progress: bool) -> tuple[Conversations, DataReport, list[int]]:
    """Checked rows of one side; from the cache if the files and the options are the same as before.

    Returns them with the report and the number of records of each entry of the option.
    """
    names, label_field, labels = options.train, options.label_field, options.labels
    if option != "data.train":
        names, label_field, labels = options.eval or [], None, None  # held-out rows need no quality label
    sources = expand(as_list(names), option, options.format, None if labels is None else as_list(labels))
    columns = Columns(options.columns)
    form = TEXT if holds_text(sources, options.format, option, columns) else options.format
    marks = label_field if labels is None else [source.label for source in sources]
    content = [[source.digest for source in sources], form, marks, *([columns.names] if columns.names else [])]
    places = [(source.name, source.entry) for source in sources]  # a directory's files have the names of files
    key = key_of("rows", content, places, options.skip_bad)

    def build(directory: Path) -> dict[str, Any]:
        bad, report = BadRows(), DataReport()
        written = _write(directory, sources, form, columns, label_field, report, bad, progress)
        columns.check(option, own_names=option != "data.train")
        bad.settle(report, options.skip_bad, f"data.columns: {columns}" if columns.names else "")
        if not len(Conversations(directory).records):
            raise DataError("\n".join([f"{option}: no usable row is left", *report.lines()]))
        return {"report": report.to_dict(), "written": [written[place] for place in range(len(names))]}

    directory, summary = get_or_build(cache_root(options.cache_dir), f"records-{key}", build)
    kind, report = Documents if form == TEXT else Conversations, DataReport(**summary["report"])
    report.notes += left_out(as_list(names), options.format)  # not in the cache: the rows are the same without them
    return kind(directory, key_of("rows", content), key), report, summary["written"]


def _write(
    directory: Path,
    sources: list[Source],
    form: str,
    columns: Columns,
    label_field: str | None,
    report: DataReport,
    bad: BadRows,
    progress: bool,
) -> Counter[int]:
    """Store the usable rows of all sources, count and name the others; return the records of each entry."""
    label_field = columns.label_field(label_field)
    usual: str | None = form
    if form == "auto":  # the format of rows with too few fields to recognise one; None: the rows before them tell
        usual = columns.formats[0] if len(columns.formats) == 1 else None
    written = Counter[int]()
    writer = DocumentWriter(directory) if form == TEXT else ConversationWriter(directory)
    unit = "documents" if form == TEXT else "rows"
    with writer, progress_bar(f"Reading {unit}", unit=f" {unit}", delay=1, enabled=progress) as bar:
        for source in sources:
            before, name, problems = writer.records, usual, BadFile(source.name)
            for place, value in source.rows():
                row = value if source.is_text else columns.renamed(value)
                bar.update()
                problems.rows += 1
                try:
                    if isinstance(row, BadRow):
                        raise row
                    if isinstance(writer, DocumentWriter):
                        if not writer.add_text(*document(row, source=place, label_field=label_field)):
                            report.add("empty_document", place)
                        continue
                    recognised = form == "auto" and isinstance(row, dict)
                    this = recognise(row, name, columns.formats) if recognised else name
                    example = convert(
                        row, this or "messages", source=place, label=source.label, label_field=label_field
                    )
                    _add(writer, example, report)
                    name = this
                except BadRow as problem:
                    problems.add(place, problem, value)
            report.rows += problems.rows
            if 0 < problems.rows == problems.count:
                report.notes.append(f"no row of {source.name} is used: all are bad (data.skip_bad)")
            bad.add(problems.lines(), problems.count)
            written[source.entry] += writer.records - before
    taken, repeated = writer.finish()
    stored = Conversations(directory)
    for record in taken.tolist():
        name = stored.file.cell(record, "id").as_py()
        bad.add([f"{stored.source(record)}: the id {quoted(name)} is taken by an earlier row"], 1)
    for record in repeated.tolist():
        report.add("duplicate", f"{stored.id(record)} ({stored.source(record)})")
    return written


def _add(writer: ConversationWriter, example: Example, report: DataReport) -> None:
    """Store a conversation with the turns that have a response; count the empty responses."""
    trained = [place for place, message in enumerate(example.messages) if message.trained]
    turns = [place for place in trained if example.messages[place].content.strip()]
    for _ in range(len(trained) - len(turns)):
        report.add("empty_response", example.source)
    if turns:
        writer.add(example, turns, content_hash(example.messages))
