"""Sources of rows: JSON arrays, JSONL, Parquet, CSV, text files, directories of these files, and hub ids.

Every problem has its place. A row of JSON or CSV that cannot be read is a bad row; a table that cannot be read ends the
reading.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sftmix.common.errors import DataError
from sftmix.common.files import HUB_ID, sha256_file
from sftmix.data.formats import TEXT, BadRow, Columns, recognise

MAX_CELL = 16 << 20
"""Most characters of a cell of CSV: an open quote would else take in the rest of the file."""

MAX_TEXT_BYTES = 64 << 20
"""Size of the largest text file: it is one document, which is tokenised in one call, in some 150 times its size."""


Row = tuple[str, Any]
"""The place of a row (`file:line`, `file:line[index]` or `file[index]`, the index from 0), and its value or the BadRow
that says why it has none."""


def _json(path: Path, name: str) -> Iterator[Row]:
    """Rows of a .json file: elements of an array where the file begins with `[`, else one row a line."""
    with open(path, encoding="utf-8-sig", errors="ignore") as file:
        is_array = file.read(1024).lstrip()[:1] == "["
    return _array(path, name) if is_array else _lines(path, name)


def _lines(path: Path, name: str) -> Iterator[Row]:
    """Rows of a JSONL file; blank lines, CRLF and a UTF-8 byte order mark are fine."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig").rstrip())
            except (ValueError, RecursionError) as error:  # not UTF-8, syntax, a number of too many digits
                row = BadRow(f"not valid JSON in UTF-8: {error}")
            yield f"{name}:{number}", row


_BEGIN = re.compile(r"[ \t\r\n]*\[(?![ \t\r\n]*\])[ \t\r\n]*")
_NEXT = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
_END = re.compile(r"[ \t\r\n]*\[?[ \t\r\n]*\][ \t\r\n]*\Z")
"""What stands before the first element of an array, between two, and after the last; an empty array is all end."""


def _array(path: Path, name: str) -> Iterator[Row]:
    """Elements of an array, each with the line at which it begins; and its index, if another row ends on that line.

    The text is in memory as a whole. Raises DataError at the first syntax error: behind it, nothing shows where the
    next row begins.
    """
    # Bytes that are not UTF-8 become lone surrogates, which the format check refuses with the row's line.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    decoder, at, index, line, last_line = json.JSONDecoder(), 0, 0, 1, 0
    try:
        while mark := (_NEXT if index else _BEGIN).match(text, at):
            line += text.count("\n", at, mark.end())
            row, at = decoder.raw_decode(text, mark.end())
            yield f"{name}:{line}[{index}]" if line == last_line else f"{name}:{line}", row
            line += text.count("\n", mark.end(), at)
            index, last_line = index + 1, line
        if not _END.match(text, at):
            at = len(text) - len(text[at:].lstrip(" \t\r\n"))
            raise json.JSONDecodeError("neither ',' nor the end of the array stands after a row", text, at)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        raise DataError(f"{name}:{line}: not valid JSON: {error}. Nothing after it can be read.") from error


def _csv(path: Path, name: str) -> Iterator[Row]:
    """Rows of a CSV file under the names of its first row; a quoted cell may hold several lines."""
    csv.field_size_limit(MAX_CELL)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader, header = csv.reader(file, strict=True), None
        while True:
            place = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, BadRow(f"not valid CSV: {error}")
                continue
            if header is None:
                header = cells
            elif len(cells) == len(header):
                yield place, dict(zip(header, cells, strict=True))
            elif cells:
                yield place, BadRow(f"{len(cells)} fields, but the header has {len(header)}")


def _table(table: Any, name: str) -> Iterator[Row]:
    """Rows of a Parquet file or of a hub dataset under their numbers. Raises DataError where one cannot be decoded."""
    read = 0
    try:
        if isinstance(table, Path):
            from pyarrow import OSFile, parquet

            batches = parquet.ParquetFile(OSFile(str(table))).iter_batches(batch_size=1024)
            table = chain.from_iterable(batch.to_pylist() for batch in batches)
        for row in table:
            yield f"{name}[{read}]", row
            read += 1
    except Exception as error:  # decoders raise errors of many libraries: a text that is not UTF-8, a broken image
        raise DataError(f"{name}: cannot be read behind its first {read:,} rows: {error}") from error


def _text(path: Path, name: str) -> Iterator[Row]:
    """The one row of a text file: its text, with LF for CRLF and CR, without byte order mark."""
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        yield name, BadRow(f"a document of {size:,} bytes; the limit is {MAX_TEXT_BYTES:,}: cut it into several")
    else:
        yield name, {TEXT: path.read_text(encoding="utf-8-sig", errors="surrogateescape")}


# ------------------------------------------------------------------------------------------ files and hub ids


READERS = {".json": _json, ".jsonl": _lines, ".csv": _csv, ".parquet": _table, ".txt": _text}
"""Ending of a file -> function: its path and its name in messages -> its rows."""
SUPPORTED = ", ".join(sorted(READERS))

SUBSET = re.compile(r"^(?!\.+\Z)[^@:/\\\x00-\x1f]+\Z")
SPLIT = re.compile(r"^(?!\.)[\w.%:+()\[\] -]+\Z")


@dataclass(frozen=True, slots=True)
class Source:
    """One file or hub dataset.

    name     as the user wrote it (inside a directory: the directory and the file's name)
    digest   sha256 of the file's bytes, or the fingerprint of the hub dataset
    dataset  the hub dataset's rows, None for a file
    entry    place of the name in data.train that it belongs to
    """

    name: str
    digest: str
    dataset: Any = None
    entry: int = 0

    def rows(self) -> Iterator[Row]:
        """Rows in file order, good and bad; raises DataError where nothing more can be read."""
        path = Path(self.name).expanduser()
        with _reading(self.name):
            if self.dataset is not None:
                yield from _table(self.dataset, self.name)
            else:
                yield from READERS[path.suffix.lower()](path, self.name)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def expand(names: Sequence[str], option: str, form: str = "auto") -> list[Source]:
    """Turn file names, directories and hub ids into sources, in the order given.

    A hub id may name a subset, a split or both: `openai/gsm8k:main`, `tatsu-lab/alpaca@train[:50%]`.

    option  name of the option that holds the names, for messages
    form    data.format. Text files of a directory are documents where it is text, or where it is auto and the directory
            holds nothing else. Beside files of rows they are notes about the rows, and are left out.
    Raises DataError with the path that is missing, unreadable, empty or of an unknown kind.
    """
    sources = list[Source]()
    for entry, name in enumerate(names):
        with _reading(f"{option}: {name}"):
            files = _files(name, option, form)
            sources += [Source(file, sha256_file(Path(file).expanduser()), None, entry) for file in files]
        if files:
            continue
        import datasets

        datasets.disable_progress_bars()  # ours tell of the rows
        path, subset, split = hub_parts(name) or (name, None, "train")
        try:
            dataset = datasets.load_dataset(path, subset, split=split)
        except Exception as error:  # the hub client raises errors of many libraries, some of them pages long
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(
                f"{option}: {name}: there is no such file, and as a Hugging Face hub id (NAME:SUBSET@SPLIT) it cannot "
                f"be loaded: {reason}. Without a network, name the data set's files instead."
            ) from error
        if not isinstance(dataset, datasets.Dataset):
            raise DataError(f"{option}: {name}: streaming datasets are not supported: the split needs every score")
        sources.append(Source(name, str(dataset._fingerprint), dataset, entry))
    return sources


def check_names(names: Sequence[str], option: str, form: str = "auto") -> None:
    """Raise the errors of `expand` that need no look into a file or at the hub; its arguments are the same."""
    for name in names:
        with _reading(f"{option}: {name}"):
            _files(name, option, form)


def _files(name: str, option: str, form: str) -> list[str]:
    """Return the files behind a name, as messages name them; none if the name is a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        children = sorted(file.name for file in path.iterdir() if file.is_file() and file.suffix.lower() in READERS)
        rows = [child for child in children if not child.lower().endswith(".txt")]
        children = children if form == TEXT or (form == "auto" and not rows) else rows
        if not children:
            raise DataError(f"{option}: {name}: no file ending in {SUPPORTED} in this directory")
        files = [str(Path(name) / child) for child in children]
    elif path.exists():
        files = [name]
    elif hub_parts(name) is not None and path.suffix.lower() not in READERS:  # `rows.jsonl` could be both
        return []
    else:
        base = "" if path.is_absolute() else f" (from the working directory, {Path.cwd()})"
        raise DataError(f"{option}: {name}: no such file or directory{base}; name a file, a directory or a hub id")
    for file in files:
        path = Path(file).expanduser()
        if path.suffix.lower() not in READERS:
            raise DataError(f"{file}: files ending in {path.suffix or 'nothing'!r} are not read; use {SUPPORTED}")
        if path.stat().st_size == 0:
            raise DataError(f"{file}:1: the file is empty")
    return files


def hub_parts(name: str) -> tuple[str, str | None, str] | None:
    """Take NAME:SUBSET@SPLIT apart; the subset may be left out, and the split (train). None if it is no hub id."""
    head, _, split = name.partition("@")
    path, colon, subset = head.partition(":")
    if not HUB_ID.match(path) or (colon and not SUBSET.match(subset)) or (split and not SPLIT.match(split)):
        return None
    return path, subset or None, split or "train"


def holds_text(sources: Sequence[Source], form: str, option: str, columns: Columns) -> bool:
    """True if the sources hold documents (by data.format, or by their first rows); False if conversations.

    form     data.format
    option   name of the option that holds the sources, for messages
    columns  data.columns, under which the rows are read
    Raises DataError if the sources are of both kinds, or if `form` does not fit a text file.
    """
    if form == TEXT:
        return True
    names = dict[bool, str]()
    for source in sources:
        is_text = source.name.lower().endswith(".txt") or (form == "auto" and _begins_with_text(source, columns))
        names[is_text] = source.name
    if form != "auto" and True in names:
        raise DataError(
            f"{option}: {names[True]} is a text file, but data.format is {form}; text files need text or auto"
        )
    if len(names) > 1:
        raise DataError(
            f"{option}: {names[True]} holds plain text and {names[False]} conversations: a run takes one kind"
        )
    return True in names


def _begins_with_text(source: Source, columns: Columns) -> bool:
    """True if the first row of a known format is text; bad rows before it say nothing about the others."""
    with suppress(DataError):  # it is raised again where the rows are read
        for _, value in source.rows():
            with suppress(BadRow):
                return recognise(columns.renamed(value), columns.formats) == TEXT
    return False
