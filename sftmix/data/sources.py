"""Sources of rows: JSON arrays, JSONL, Parquet, CSV, text files, directories of these files, and hub ids.

Every problem has its place. A row of JSON or CSV that cannot be read is a bad row; a table that cannot be read ends the
reading.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sftmix.common.errors import DataError
from sftmix.common.files import HUB_ID, place_of, sha256_file
from sftmix.data.formats import TEXT, BadRow, Columns, recognise

MAX_CELL = 16 << 20
"""Most characters of a cell of CSV: an open quote would else take in the rest of the file."""

MAX_TEXT_BYTES = 64 << 20
"""Size of the largest text file: it is one document, which is tokenised in one call, in some 150 times its size."""


Row = tuple[str, Any]
"""The place of a row in its source (`:line`, `:line[index]` or `[index]`, the index from 0), and its value or the
BadRow that says why it has none. A reader raises BadRow, with the place, where nothing more can be read."""


def _json(path: Path) -> Iterator[Row]:
    """Rows of a .json file: elements of an array where the file begins with `[`, else one row a line."""
    with open(path, encoding="utf-8-sig", errors="ignore") as file:
        is_array = file.read(1024).lstrip()[:1] == "["
    return _array(path) if is_array else _lines(path)


def _lines(path: Path) -> Iterator[Row]:
    """Rows of a JSONL file; blank lines, CRLF and a UTF-8 byte order mark are fine."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig").rstrip())
            except (ValueError, RecursionError) as error:  # not UTF-8, syntax, a number of too many digits
                row = BadRow(f"not valid JSON in UTF-8: {error}")
            yield f":{number}", row


_BEGIN = re.compile(r"[ \t\r\n]*\[(?![ \t\r\n]*\])[ \t\r\n]*")
_NEXT = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
_END = re.compile(r"[ \t\r\n]*\[?[ \t\r\n]*\][ \t\r\n]*\Z")
"""What stands before the first element of an array, between two, and after the last; an empty array is all end."""


def _array(path: Path) -> Iterator[Row]:
    """Elements of an array, each with the line at which it begins; and its index, if another row ends on that line.

    The text is in memory as a whole. Nothing is read behind the first syntax error, as nothing shows where the next row
    begins.
    """
    # Bytes that are not UTF-8 become lone surrogates, which the format check refuses with the row's line.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    decoder, at, index, line, last_line = json.JSONDecoder(), 0, 0, 1, 0
    try:
        while mark := (_NEXT if index else _BEGIN).match(text, at):
            line += text.count("\n", at, mark.end())
            row, at = decoder.raw_decode(text, mark.end())
            yield f":{line}[{index}]" if line == last_line else f":{line}", row
            line += text.count("\n", mark.end(), at)
            index, last_line = index + 1, line
        if not _END.match(text, at):
            at = len(text) - len(text[at:].lstrip(" \t\r\n"))
            raise json.JSONDecodeError("neither ',' nor the end of the array stands after a row", text, at)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        raise BadRow(f":{line}: not valid JSON: {error}. Nothing after it can be read.") from error


def _csv(path: Path) -> Iterator[Row]:
    """Rows of a CSV file under the names of its first row; a quoted cell may hold several lines."""
    csv.field_size_limit(MAX_CELL)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader, header = csv.reader(file, strict=True), None
        while True:
            place = f":{reader.line_num + 1}"
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


def _table(table: Any) -> Iterator[Row]:
    """Rows of a Parquet file or of a hub dataset under their numbers."""
    read = 0
    try:
        if isinstance(table, Path):
            from pyarrow import OSFile, parquet  # by its path alone, s3:x.parquet would be a place on the web

            batches = parquet.ParquetFile(OSFile(str(table))).iter_batches(batch_size=1024)
            table = chain.from_iterable(batch.to_pylist() for batch in batches)
        for row in table:
            yield f"[{read}]", row
            read += 1
    except Exception as error:  # decoders raise errors of many libraries: a text that is not UTF-8, a broken image
        raise BadRow(f": cannot be read behind its first {read:,} rows: {error}") from error


def _text(path: Path) -> Iterator[Row]:
    """The one row of a text file: its text, with LF for CRLF and CR, without byte order mark."""
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        yield "", BadRow(f"a document of {size:,} bytes; the limit is {MAX_TEXT_BYTES:,}: cut it into several")
    else:
        yield "", {TEXT: path.read_text(encoding="utf-8-sig", errors="surrogateescape")}


# ------------------------------------------------------------------------------------------ files and hub ids


READERS = {".json": _json, ".jsonl": _lines, ".csv": _csv, ".parquet": _table, ".txt": _text}
"""Ending of a file -> function: its path -> its rows."""
SUPPORTED = ", ".join(sorted(READERS))

SUBSET = re.compile(r"^(?!\.+\Z)[^@:/\\\x00-\x1f]+\Z")
SPLIT = re.compile(r"^(?!\.)[\w.%:+()\[\] -]+\Z")


class Source(NamedTuple):
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
        """Rows in file order, good and bad, under `file:line`; raises DataError where nothing more can be read."""
        path = place_of(self.name)
        with _reading(self.name):
            rows = READERS[path.suffix.lower()](path) if self.dataset is None else _table(self.dataset)
            for place, row in rows:
                yield f"{self.name}{place}", row


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    except BadRow as error:
        raise DataError(f"{name}{error}") from error


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
            sources += [Source(file, sha256_file(place_of(file)), None, entry) for file in files]
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


def check_names(names: Sequence[str], option: str, form: str) -> None:
    """Raise the errors of `expand` that need no look into a file or at the hub; its arguments are the same."""
    for name in names:
        with _reading(f"{option}: {name}"):
            _files(name, option, form)


def _files(name: str, option: str, form: str) -> list[str]:
    """Return the files behind a name, as messages name them; none if the name is a hub id."""
    path, files = place_of(name), [name]
    if path.is_dir():
        children = (file.name for file in path.iterdir() if file.is_file() and file.suffix.lower() in READERS)
        files = [str(Path(name) / child) for child in sorted(children)]
        rows = [file for file in files if not file.lower().endswith(".txt")]
        if form != TEXT and (rows or form != "auto"):
            files = rows
        if not files:
            raise DataError(f"{option}: {name}: no file ending in {SUPPORTED} in this directory")
    elif not path.exists():
        if hub_parts(name) is not None and path.suffix.lower() not in READERS:  # `rows.jsonl` could be both
            return []
        raise DataError(
            f"{option}: {name}: no such file or directory (looked for {path.absolute()}); name a file, a directory or "
            "a hub id"
        )
    elif path.suffix.lower() not in READERS:
        raise DataError(f"{name}: files ending in {path.suffix or 'nothing'!r} are not read; use {SUPPORTED}")
    for file in files:
        if place_of(file).stat().st_size == 0:
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
        is_text = source.name.lower().endswith(".txt")
        if form == "auto" and not is_text:
            with suppress(DataError):  # it is raised again where the rows are read
                for _, value in source.rows():
                    with suppress(BadRow):  # bad rows before one of a known format say nothing about the others
                        is_text = recognise(columns.renamed(value), columns.formats) == TEXT
                        break
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
