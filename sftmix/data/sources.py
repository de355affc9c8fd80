"""Sources of rows: JSON arrays, JSONL, Parquet, Arrow, CSV and text files, directories of these, and hub ids.

Every problem has its place. A row of JSON or CSV that cannot be read is a bad row; a table that cannot be read ends the
reading.
"""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from sftmix.common.errors import DataError
from sftmix.common.files import HUB_ID, decoded, place_of, sha256_file
from sftmix.common.plain import listed
from sftmix.data.formats import TEXT, Columns, recognise
from sftmix.data.values import BadRow

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
                row = json.loads(decoded(line).rstrip())
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
    text = decoded(path.read_bytes(), "surrogateescape")
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
    with open(path, "rb") as head:
        decoded(head.read(4), "ignore")  # raises the error of another encoding
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
    """Rows of a Parquet or Arrow file or of a hub dataset under their numbers."""
    read = 0
    try:
        for row in _rows_of_file(table) if isinstance(table, Path) else table:
            yield f"[{read}]", row
            read += 1
    except Exception as error:  # decoders raise errors of many libraries: a text that is not UTF-8, a broken image
        raise BadRow(f": cannot be read behind its first {read:,} rows: {error}") from error


def _rows_of_file(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, or of an Arrow file of datasets; maps become dicts, and texts of the type JSON values."""
    if path.suffix.lower() == ".arrow":
        from datasets import Dataset

        yield from Dataset.from_file(str(path))
        return
    from pyarrow import OSFile, Table, parquet  # by its path alone, s3:x.parquet would be a place on the web

    for batch in parquet.ParquetFile(OSFile(str(path))).iter_batches(batch_size=1024):
        if "arrow.json" in str(batch.schema):  # pyarrow would leave the text
            from datasets import Dataset

            yield from Dataset(Table.from_batches([batch]))
        else:
            yield from batch.to_pylist(maps_as_pydicts="lossy")


def _text(path: Path) -> Iterator[Row]:
    """The one row of a text file: its text, with LF for CRLF and CR, without byte order mark."""
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        yield "", BadRow(f"a document of {size:,} bytes; the limit is {MAX_TEXT_BYTES:,}: cut it into several")
    else:
        yield "", {TEXT: decoded(path.read_bytes(), "surrogateescape")}


# ------------------------------------------------------------------------------------------ files and hub ids


READERS = {".json": _json, ".jsonl": _lines, ".csv": _csv, ".parquet": _table, ".arrow": _table, ".txt": _text}
"""Ending of a file -> function: its path -> its rows."""
SUPPORTED = ", ".join(sorted(READERS))

_PARTS = re.compile(r"(.+?)(?::(?!\.+(?:@|\Z))([^@:/\\\x00-\x1f]+))?(?:@(?!\.)([\w.%:+()\[\] -]+))?\Z")
"""NAME:SUBSET@SPLIT, of which subset and split may be left out."""

_NO_ROWS = re.compile(r"\.|cache-.*\.arrow|state\.json|dataset_(infos?|dict)\.json")
"""Names of files that are never rows: hidden ones, and those that datasets writes beside rows for itself."""
_HELD_OUT = re.compile(r"(^|[\W_\d])(tests?|testing|evals?|evaluation|valid|validation|val|dev)([\W_\d]|$)", re.I)
"""Names of files that are not for training where others are; datasets knows them by these words, too."""

_NO_FILE = (
    ": there is no such file, and as a Hugging Face hub id (NAME:SUBSET@SPLIT; without a network, name the data set's "
    "files) it cannot be loaded"
)


class Source(NamedTuple):
    """One file or hub dataset.

    name    as the user wrote it (inside a directory: the directory, as it was named, and the file's name)
    digest  sha256 of the file's bytes, or the fingerprint of the hub dataset
    data    path of the file, or the hub dataset's rows
    entry   place of the name in data.train that it belongs to
    """

    name: str
    digest: str
    data: Any
    entry: int = 0

    def rows(self) -> Iterator[Row]:
        """Rows in file order, good and bad, under `file:line`; raises DataError where nothing more can be read."""
        reader = READERS[self.data.suffix.lower()] if isinstance(self.data, Path) else _table
        with _reading(self.name):
            for place, row in reader(self.data):
                yield f"{self.name}{place}", row


@contextmanager
def _reading(name: str, problem: str = ": cannot be read") -> Iterator[None]:
    """Raise DataError for whatever readers raise: datasets has errors of many libraries, some of them pages long."""
    try:
        yield
    except DataError:
        raise
    except BadRow as error:
        raise DataError(f"{name}{error}") from error
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300] or type(error).__name__
        raise DataError(f"{name}{problem}: {reason}") from error


def expand(names: Sequence[str], option: str, form: str = "auto") -> tuple[list[Source], list[str]]:
    """Turn file names, directories and hub ids into sources, in the order given, and a line about each directory.

    A hub id may name a subset, a split or both, `openai/gsm8k:main`, `tatsu-lab/alpaca@train[:50%]`; so may a directory
    that datasets has written, or that has been downloaded from the hub.

    option  name of the option that holds the names, for messages; in data.train alone, files for tests are left out
    form    data.format. Text files of a directory are documents where it is text, or where it is auto and the directory
            holds nothing else. Beside files of rows they are notes about the rows, and are left out.
    Raises DataError with the path that is missing, unreadable, empty or of an unknown kind.
    """
    sources, lines = list[Source](), list[str]()
    for entry, name in enumerate(names):
        with _reading(f"{option}: {name}"):
            files = _files(name, option, form, lines)
            sources += [Source(file, sha256_file(path), path, entry) for file, path in files.items()]
        if not files:
            with _reading(f"{option}: {name}", _NO_FILE):
                place, subset, split = name_parts(name)
                dataset = _datasets().load_dataset(place, subset, split=split or "train")
            if not isinstance(dataset, _datasets().Dataset):
                raise DataError(f"{option}: {name}: streaming datasets are not supported: the split needs every score")
            sources.append(Source(name, str(dataset._fingerprint), dataset, entry))
    return sources, lines


def check_names(names: Sequence[str], option: str, form: str) -> None:
    """Raise the errors of `expand` that need no look at rows or at the hub; its arguments are the same."""
    for name in names:
        with _reading(f"{option}: {name}"):
            _files(name, option, form, [])


def _files(name: str, option: str, form: str, lines: list[str]) -> dict[str, Path]:
    """Return the files behind a name, by their names in messages; none for a hub id. Add a line about a directory."""
    place, subset, split = name_parts(name)
    path = place_of(name)
    directory = place_of(place)
    files = {name: path}
    if directory.is_dir():
        directory = directory.resolve()
        with _reading(f"{option}: {name}", ": as a data set (DIRECTORY:SUBSET@SPLIT) it cannot be read"):
            found, left = _in_directory(directory, subset, split, option, form)
        files = {str(Path(name) / file.relative_to(directory)): file for file in found}
        left_out = listed(str(file.relative_to(directory)) for file in left)
        lines.append(f"{option}: read: {listed(files)}; left out of {name}: {left_out}")
    elif not path.exists():
        if HUB_ID.match(place) and path.suffix.lower() not in READERS:  # `rows.jsonl` could be both
            return {}
        raise DataError(
            f"{option}: {name}: no such file or directory (looked for {path.absolute()}); name a file, a directory or "
            "a hub id"
        )
    for file, path in files.items():
        if path.suffix.lower() not in READERS:
            raise DataError(f"{file}: files ending in {path.suffix or 'nothing'!r} are not read; use {SUPPORTED}")
        if path.stat().st_size == 0:
            raise DataError(f"{file}:1: the file is empty")
    return files


def _in_directory(
    directory: Path, subset: str | None, split: str | None, option: str, form: str
) -> tuple[list[Path], list[Path]]:
    """Return the files in a directory that are read, and those below it that could be and are left out."""
    below = {
        file
        for file in directory.rglob("*")
        if file.suffix.lower() in READERS and file.is_file() and not _NO_ROWS.match(file.name)
    }
    found = sorted(file for file in below if file.parent == directory)
    is_described = (directory / "state.json").exists() or any(  # by save_to_disk, or as the hub does it
        "\nconfigs:" in card.read_text("utf-8", "replace") for card in directory.glob("README.md")
    )
    if subset or split or is_described or not found:
        found = _of_split(directory, subset, split or "train")
    elif option == "data.train":
        found = [file for file in found if not _HELD_OUT.search(file.stem)] or found
    rows = [file for file in found if file.suffix.lower() != ".txt"]
    if form != TEXT and (rows or form != "auto"):
        found = rows
    if not found:
        raise ValueError(f"there is no file ending in {SUPPORTED}")
    return found, sorted(below.difference(found))


def _of_split(directory: Path, subset: str | None, split: str) -> list[Path]:
    """Return the files of a split, as datasets finds them."""
    if subset or not {"state.json", "dataset_dict.json"} & {*os.listdir(directory)}:
        splits = _datasets().load_dataset_builder(str(directory), subset).config.data_files
    else:
        saved = _datasets().load_from_disk(directory, keep_in_memory=False)
        sides = saved if isinstance(saved, dict) else {"train": saved}
        splits = {name: [file["filename"] for file in side.cache_files] for name, side in sides.items()}
    if split not in splits:
        raise ValueError(f"it has no split {split}; there are {listed(splits)}")
    return list(map(Path, splits[split]))


def _datasets() -> Any:
    """Import datasets, which takes more than a second, without its progress bars: ours tell of the rows."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


def name_parts(name: str) -> tuple[str, str | None, str | None]:
    """Take NAME:SUBSET@SPLIT apart; subset and split may be left out, as with a file or directory of that very name."""
    match = None if place_of(name).exists() else _PARTS.match(name)
    return (match[1], match[2], match[3]) if match else (name, None, None)


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
