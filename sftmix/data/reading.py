"""Reading of rows: sources -> records of checked conversations (or documents) with ids, and a report, both cached."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from sftmix.components.row_format import RowFormat
from sftmix.data.report import ALL_BAD, NAMED, UNREAD, Case, DataReport, hear
from sftmix.data.row_files import has_many_lines
from sftmix.data.sources import expand
from sftmix.data.store import EXAMPLE, Conversations, content_hash, id_of, stored, write_rows
from sftmix.disk.cache import Record, get_or_build, key_of
from sftmix.options.data import DataOptions
from sftmix.text.encoder import identity
from sftmix.text.examples import has_response, left_out
from sftmix.text.formats import Columns, Converter
from sftmix.text.thoughts import thinks
from sftmix.text.values import without_null
from sftmix.types import Example
from sftmix.words.errors import BadRow, DataError
from sftmix.words.fields import SHOWN_FIELDS, TEXT, listed
from sftmix.words.given import as_list
from sftmix.words.progress import progress_bar
from sftmix.words.shown import counted, quoted

SCHEMA = pa.schema([*EXAMPLE, ("content", pa.uint64())])
"""Examples with the hash of their content."""


class RowReader:
    """The reading of one side.

    option       data.train or data.eval
    options      of the rows
    sources      the files and data sets that the option names
    lines        what is to be said of them
    labels, label_field  one for each entry of data.train, or the field with them, or None; held-out rows need none
    form         a row format, or a word of data.format: text if auto finds text files alone
    most         None, or the number of rows behind which nothing is read
    converter    of its rows, whose fields it learns to know while it reads
    """

    def __init__(self, option: str, options: DataOptions, form: RowFormat | str) -> None:
        self.option, self.options = option, options
        train = option == "data.train"
        self.labels = as_list(options.labels) if train and options.labels else None
        self.label_field = options.label_field if train else None
        self.sources, self.lines = expand(as_list(options.train if train else options.eval), option, form)
        columns = Columns(options.columns)
        # A text file among rows has no field of a conversation, and is a bad row.
        if form == "auto" and all(source.name.lower().endswith(".txt") for source in self.sources):
            form = TEXT
        self.form = form
        self.converter = Converter(columns, form, options.roles, self.label_field, last=options.trained_turns == "last")
        # All rows are needed to hold some out or to leave some out, and of text the limit is one of windows.
        chosen = options.eval_fraction is not None or options.exclude is not None or options.duplicates == "drop"
        # One more, which says that there are more.
        self.most = options.limit + 1 if train and options.limit and not chosen and form != TEXT else None
        self.report = DataReport()
        self.times = Counter[str]()  # how often each id came before

    def read(self) -> tuple[Conversations, DataReport]:
        """Return the checked rows, and the report; from the cache if all is as it was."""
        options = self.options
        key = key_of(
            files=[(source.name, source.digest) for source in self.sources],  # names are stored with the rows
            form=identity(self.form),
            labels=[self.labels[source.entry] for source in self.sources] if self.labels else self.label_field,
            columns=options.columns,
            roles=options.roles,
            trained_turns=options.trained_turns,
            skip_bad=options.skip_bad,
            option=self.option,  # held-out rows may lack the label and the fields of data.columns
            most=self.most,
        )
        directory, summary = get_or_build(options.cache_dir, f"rows-{key}", self.build)
        report = DataReport(**summary)
        report.notes[:0] = self.lines  # files that a directory has, and are not read, are not in the key
        return Conversations(directory, key), report

    def build(self, directory: Path) -> Record:
        """Write the records, and return the report for the cache."""
        with progress_bar("Reading rows", unit=" rows", delay=1) as bar:
            count = write_rows(directory / "rows.arrow", SCHEMA, itertools.islice(self._records(bar), self.most))
        for source in self.sources:  # the key has the hash of what was there before
            source.check_unchanged()
        columns, unread = self.converter.columns, self.converter.unread
        if self.option == "data.train" and columns.present:  # before bad rows, which a wrong name makes of all
            _check_present(columns, self.label_field, self.report.rows if count == self.most else None)
        if (bad := self.report.counts.get("bad_row")) and not self.options.skip_bad:
            rest = f"; {ALL_BAD}" if bad > NAMED else ""
            problem = f"{counted(bad, 'bad row')} (data.skip_bad drops and counts them{rest}); the first:"
            raise DataError("\n".join([problem, *self.report.first["bad_row"]]))
        if not count:
            raise DataError("\n".join([f"{self.option}: no usable row is left", *self.report.lines()]))
        if unread:
            most = ", ".join(f"{name} ({counted(n, 'row')})" for name, n in unread.most_common(SHOWN_FIELDS))
            self.report.notes.append(f"{self.option}: {counted(len(unread), 'field')} not in the text: {most}")
        return self.report.to_dict()

    def _records(self, bar: Any) -> Iterator[Record]:
        """Yield the records of all sources; count the rows, and name those that are none."""
        for source in self.sources:
            label = self.labels[source.entry] if self.labels else None
            for place, value in source.rows():
                self.report.rows += 1
                bar.update()
                try:
                    row = self.converter.columns.renamed(value)  # raises the BadRow that a reader gave for a value
                    if self.label_field is not None:
                        label = without_null(value).get(self.label_field)  # by its own name: `weight` may be a label
                    yield from self._record(self.converter.example(row, place, label))
                    if source.name.lower().endswith(".csv") and has_many_lines(value):
                        self.report.add("many_lines", Case(place))
                    for name in self.converter.skipped:
                        hear(UNREAD, Case(place, detail=f": {name}"))
                except BadRow as problem:
                    self.report.add("bad_row", Case(place, detail=f": {problem}"))

    def _record(self, example: Example) -> Iterator[Record]:
        """Yield the record of a row, or nothing for one without any response; count what is to be said of it.

        Its id is its own, or a hash of its content with `#k` for the k-th repetition. Raises BadRow for an own id that
        an earlier row has.
        """
        for reason in left_out(example):
            self.report.add(reason, Case(example.source))
        if not has_response(example):
            return
        content = content_hash(example.messages)
        name = own = example.id or id_of(example, content)
        if example.id and name in self.times:
            raise BadRow(f"the id {quoted(name)} is taken by an earlier row; data.columns '{{id: null}}' reads no ids")
        while name in self.times:  # again if a row has such an id of its own
            name = f"{own}#{self.times[own]}"
            self.times[own] += 1
        self.times[name] = 1
        if example.messages[0].role == "system":
            self.report.add("system", Case(example.source))
        if thinks(example):
            self.report.add("thought", Case(example.source))
        yield stored(replace(example, id=name)) | {"content": int(content, 16)}


def _check_present(columns: Columns, label_field: str | None, most: int | None) -> None:
    """Raise DataError for a field that options name, and no row has.

    most  None, or the number of rows that data.limit has read
    """
    none = "no row" if most is None else f"none of the first {counted(most, 'row')}, all that data.limit reads,"
    for name, column in {**columns.names, "the label": label_field}.items():
        if column is not None and column not in columns.present:
            raise DataError(
                f"data.columns, data.label_field: {none} of data.train has the field {column!r} (for {name}); "
                f"the fields there are {listed(columns.present)}"
            )
