"""Sources of rows: JSON arrays, JSONL, Parquet, CSV, text files, directories of these files, and hub ids."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sftmix.common.errors import DataError
from sftmix.common.files import sha256_file
from sftmix.common.names import HUB_ID
from sftmix.data.columns import Columns
from sftmix.data.formats import TEXT, recognise
from sftmix.data.jsonrows import MAX_ROW_BYTES, BadRow, Row, foreign_encoding, iter_json, iter_lines

V = TypeVar("V")
TEXT_SUFFIX = ".txt"

SUBSET = re.compile(r"^(?!\.+\Z)[^@:/\\\x00-\x1f]+\Z")
SPLIT = re.compile(r"^(?!\.)[\w.%:+()\[\] -]+\Z")


@dataclass(frozen=True, slots=True)
class Source:
    """One file or hub dataset.

    name     as the user wrote it (inside a directory: the directory and the file's name)
    digest   sha256 of the file's bytes, or the fingerprint of the hub dataset
    dataset  the hub dataset's rows, None for a file
    label    the label of all its rows (data.labels)
    entry    place of the name in data.train that it belongs to
    """

    name: str
    digest: str
    dataset: Any = None
    label: str | None = None
    entry: int = 0

    @property
    def is_text(self) -> bool:
        """A .txt file, which is one document."""
        return self.dataset is None and Path(self.name).suffix.lower() == TEXT_SUFFIX

    def rows(self) -> Iterator[Row]:
        """Rows in file order, good and bad; raises DataError where nothing more can be read."""
        if self.dataset is not None:
            return _readable(((f"{self.name}[{index}]", row) for index, row in enumerate(self.dataset)), self.name)
        path = Path(self.name).expanduser()
        return _readable(_READERS[path.suffix.lower()](path, self.name), self.name)


def _readable(parts: Iterator[V], name: str) -> Iterator[V]:
    """Yield the parts as they are; raise a DataError that names the file if it cannot be read."""
    try:
        yield from parts
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def expand(names: Sequence[str], option: str, form: str = "auto", labels: Sequence[str] | None = None) -> list[Source]:
    """Turn file names, directories and hub ids into sources, in the order given.

    A hub id may name a subset, a split or both: `openai/gsm8k:main`, `tatsu-lab/alpaca@train[:50%]`.

    option  name of the option that holds the names, for messages
    form    data.format. Text files of a directory are documents where it is text, or where it is auto and the directory
            holds nothing else. Beside files of rows they are notes about the rows, and are left out.
    labels  None, or one label for each name
    Raises DataError with the path that is missing, unreadable, empty or of an unknown kind.
    """
    sources: list[Source] = []
    for place, name in enumerate(names):
        with _reading(name, option):
            there = _files(name, option, form)
            found = [_hub(name, option)] if there is None else [Source(file, sha256_file(path)) for path, file in there]
        label = None if labels is None else labels[place]
        sources += [replace(source, label=label, entry=place) for source in found]
    return sources


def check_names(names: Sequence[str], option: str, form: str = "auto") -> None:
    """Raise the errors of `expand` that need no look into a file or at the hub; its arguments are the same."""
    for name in names:
        with _reading(name, option):
            _files(name, option, form)


@contextmanager
def _reading(name: str, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{option}: {name}: cannot be read: {error.strerror or error}") from error


def _files(name: str, option: str, form: str) -> list[tuple[Path, str]] | None:
    """Return the files behind a name, each with its name in messages; None if the name is a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = [(child, str(Path(name) / child.name)) for child in _children(path, name, option, form)]
    elif path.exists():
        found = [(path, name)]
    elif hub_parts(name) is not None and path.suffix.lower() not in _READERS:
        return None
    else:
        seen = "" if path.is_absolute() else f" (from the working directory, {Path.cwd()})"
        raise DataError(f"{option}: {name}: no such file or directory{seen}")
    for file, shown in found:
        _check_file(file, shown)
    return found


def _children(path: Path, name: str, option: str, form: str) -> list[Path]:
    found = sorted(child for child in path.iterdir() if child.is_file() and child.suffix.lower() in _READERS)
    rows = [child for child in found if child.suffix.lower() != TEXT_SUFFIX]
    if form != TEXT and (rows or form != "auto"):
        found = rows
    if not found:
        raise DataError(f"{option}: {name}: no file ending in {_supported()} in this directory")
    return found


def _supported() -> str:
    return ", ".join(sorted(_READERS))


def _check_file(path: Path, name: str) -> None:
    if path.suffix.lower() not in _READERS:
        raise DataError(f"{name}: files ending in {path.suffix or 'nothing'!r} are not read; use {_supported()}")
    if path.stat().st_size == 0:
        raise DataError(f"{name}:1: the file is empty")


def hub_parts(name: str) -> tuple[str, str | None, str] | None:
    """Take NAME:SUBSET@SPLIT apart; the subset may be left out, and the split (train). None if it is no hub id."""
    head, _, split = name.partition("@")
    path, colon, subset = head.partition(":")
    if not HUB_ID.match(path) or (colon and not SUBSET.match(subset)) or (split and not SPLIT.match(split)):
        return None
    return path, subset or None, split or "train"


def _hub(name: str, option: str) -> Source:
    import datasets

    datasets.disable_progress_bars()  # ours tell of the rows
    path, subset, split = hub_parts(name) or (name, None, "train")
    try:
        dataset = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # the hub client raises errors of many libraries
        if there := _subsets(str(error)):
            missing = "has several subsets" if subset is None else f"has no subset {subset!r}"
            raise DataError(
                f"{option}: {name}: the data set {missing}; name one of {', '.join(there)}: {path}:{there[0]}@{split}"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{option}: {name}: there is no such file, and as a Hugging Face hub id it cannot be loaded: {reason}. "
            "Check the spelling; without a network, download the dataset's files and name them instead."
        ) from error
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"{option}: {name}: streaming datasets are not supported: the median split needs every score")
    return Source(name, str(dataset._fingerprint), dataset)


def _subsets(message: str) -> list[str]:
    """Read the subsets that an error of `datasets` lists, where none was named, or one that is not there."""
    found = re.search(r"(?:available configs|not found\. Available): \[(.*)\]", message)
    return re.findall(r"""['"]([^'"]+)['"]""", found[1]) if found else []


def holds_text(sources: Sequence[Source], form: str, option: str, columns: Columns) -> bool:
    """True if the sources hold documents (by data.format, or by their first rows); False if conversations.

    form     data.format
    option   name of the option that holds the sources, for messages
    columns  data.columns, under which the rows are read
    Raises DataError if the sources are of both kinds, or if `form` does not fit a text file.
    """
    if form == TEXT:
        return True
    is_text = [source.is_text or (form == "auto" and _begins_with_text(source, columns)) for source in sources]
    if not any(is_text):
        return False
    first = sources[is_text.index(True)].name
    if form != "auto":
        raise DataError(f"{option}: {first} is a text file, but data.format is {form}; text files need text or auto")
    if not all(is_text):
        other = sources[is_text.index(False)].name
        raise DataError(
            f"{option}: {first} holds plain text and {other} conversations: a run takes one kind of the two "
            "(data.format text reads the field `text` of every row)"
        )
    return True


def _begins_with_text(source: Source, columns: Columns) -> bool:
    """True if the first row is recognised as text."""
    try:
        row = columns.renamed(next(source.rows(), ("", None))[1])
        return isinstance(row, dict) and recognise(row, first=columns.formats) == TEXT
    except (DataError, BadRow):  # the same error is raised again where the rows are read
        return False


# ---------------------------------------------------------------------------------------------- readers


def _csv_rows(path: Path, name: str) -> Iterator[Row]:
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        # Bytes that are not UTF-8 become lone surrogates, which the format check refuses with the row's line.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header: list[str] | None = None
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield f"{name}:{line}", BadRow(f"not valid CSV: {error}")
                    continue
                if header is None:
                    header = cells
                elif len(cells) == len(header):
                    yield f"{name}:{line}", dict(zip(header, cells, strict=True))
                elif cells:
                    yield f"{name}:{line}", BadRow(f"{len(cells)} fields, but the header has {len(header)}")
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.OSFile(str(path)))
        index = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{name}[{index}]", row
                index += 1
    except pa.ArrowException as error:
        raise DataError(f"{name}: not a readable Parquet file: {error}") from error


def _text_rows(path: Path, name: str) -> Iterator[Row]:
    """The one row of a text file; its field `text` is an iterator of pieces."""
    yield name, {"text": _readable(iter_text(path, name), name)}


def iter_text(path: Path, name: str) -> Iterator[str]:
    """Read the text of a file in pieces of at most 64 Ki characters, with LF for CRLF and CR, without byte order mark.

    Raises BadRow with the first line that is not UTF-8 text.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    line = 1
    with open(path, "rb") as file:
        if problem := foreign_encoding(file.read(4)):
            raise BadRow(problem, f"{name}:1")
        file.seek(0)
        while True:
            raw = file.read(1 << 16)
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise BadRow(f"not valid UTF-8: byte 0x{error.object[error.start]:02x}", f"{name}:{line}") from error
            if (zero := raw.find(b"\0")) >= 0:
                line += raw[:zero].count(b"\n")
                raise BadRow("contains a NUL character", f"{name}:{line}")
            line += raw.count(b"\n")
            if not raw:
                return


_READERS = {
    ".json": iter_json,
    ".jsonl": iter_lines,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    TEXT_SUFFIX: _text_rows,
}
