"""Sources of rows: JSON arrays, JSONL, Parquet, CSV, text files, directories of these files, and hub ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.errors import DataError
from sftmix.common.files import sha256_file
from sftmix.common.names import HUB_ID
from sftmix.data.columns import Columns
from sftmix.data.formats import TEXT, recognise
from sftmix.data.jsonrows import BadRow, Row, iter_json, iter_lines
from sftmix.data.tablerows import iter_csv, iter_hub, iter_parquet

TEXT_SUFFIX = ".txt"

MAX_TEXT_BYTES = 64 << 20
"""Size of the largest text file: it is one document, which is tokenised in one call, in some 150 times its size."""

REASON = 300
"""Most characters of what the hub's client says of a data set that cannot be loaded."""

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
        path = Path(self.name).expanduser()
        with _reading(self.name):
            if self.dataset is not None:
                yield from iter_hub(self.dataset, self.name)
            else:
                yield from READERS[path.suffix.lower()](path, self.name)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
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
    for entry, name in enumerate(names):
        label = labels[entry] if labels else None
        with _reading(f"{option}: {name}"):
            files = _files(name, option, form)
            if files is None:
                dataset = _hub(name, option)
                sources.append(Source(name, str(dataset._fingerprint), dataset, label, entry))
            for path, shown in files or ():
                sources.append(Source(shown, sha256_file(path), None, label, entry))
    return sources


def check_names(names: Sequence[str], option: str, form: str = "auto") -> None:
    """Raise the errors of `expand` that need no look into a file or at the hub; its arguments are the same."""
    for name in names:
        with _reading(f"{option}: {name}"):
            _files(name, option, form)


def _files(name: str, option: str, form: str) -> list[tuple[Path, str]] | None:
    """Return the files behind a name, each with its name in messages; None if the name is a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        read = _read_of(path, form)
        if not read:
            raise DataError(f"{option}: {name}: no file ending in {SUPPORTED} in this directory")
        files = [(child, str(Path(name) / child.name)) for child in read]
    elif path.exists():
        files = [(path, name)]
    elif hub_parts(name) is not None and path.suffix.lower() not in READERS:  # `rows.jsonl` could be both
        return None
    else:
        base = "" if path.is_absolute() else f" (from the working directory, {Path.cwd()})"
        raise DataError(f"{option}: {name}: no such file or directory{base}; name a file, a directory or a hub id")
    for file, shown in files:
        if file.suffix.lower() not in READERS:
            raise DataError(f"{shown}: files ending in {file.suffix or 'nothing'!r} are not read; use {SUPPORTED}")
        if file.stat().st_size == 0:
            raise DataError(f"{shown}:1: the file is empty")
    return files


def _read_of(directory: Path, form: str) -> list[Path]:
    files = sorted(child for child in directory.iterdir() if child.is_file() and child.suffix.lower() in READERS)
    rows = [child for child in files if child.suffix.lower() != TEXT_SUFFIX]
    return rows if form != TEXT and (rows or form != "auto") else files


def hub_parts(name: str) -> tuple[str, str | None, str] | None:
    """Take NAME:SUBSET@SPLIT apart; the subset may be left out, and the split (train). None if it is no hub id."""
    head, _, split = name.partition("@")
    path, colon, subset = head.partition(":")
    if not HUB_ID.match(path) or (colon and not SUBSET.match(subset)) or (split and not SPLIT.match(split)):
        return None
    return path, subset or None, split or "train"


def _hub(name: str, option: str) -> Any:
    """Load a data set of the hub; raise DataError where it cannot be."""
    import datasets

    datasets.disable_progress_bars()  # ours tell of the rows
    path, subset, split = hub_parts(name) or (name, None, "train")
    try:
        dataset = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # the hub client raises errors of many libraries
        reason = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise DataError(
            f"{option}: {name}: there is no such file, and as a Hugging Face hub id (NAME:SUBSET@SPLIT) it cannot be "
            f"loaded: {reason}. Without a network, name the data set's files instead."
        ) from error
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"{option}: {name}: streaming datasets are not supported: the median split needs every score")
    return dataset


def holds_text(sources: Sequence[Source], form: str, option: str, columns: Columns) -> bool:
    """True if the sources hold documents (by data.format, or by their first rows); False if conversations.

    form     data.format
    option   name of the option that holds the sources, for messages
    columns  data.columns, under which the rows are read
    Raises DataError if the sources are of both kinds, or if `form` does not fit a text file.
    """
    if form == TEXT:
        return True
    text, others = list[str](), list[str]()
    for source in sources:
        is_text = source.is_text or (form == "auto" and _begins_with_text(source, columns))
        (text if is_text else others).append(source.name)
    if text and form != "auto":
        raise DataError(f"{option}: {text[0]} is a text file, but data.format is {form}; text files need text or auto")
    if text and others:
        raise DataError(f"{option}: {text[0]} holds plain text and {others[0]} conversations: a run takes one kind")
    return bool(text)


def _begins_with_text(source: Source, columns: Columns) -> bool:
    """True if the first row of a known format is text; bad rows before it say nothing about the others."""
    with suppress(DataError):  # it is raised again where the rows are read
        for _, value in source.rows():
            if isinstance(row := columns.renamed(value), dict):
                with suppress(BadRow):
                    return recognise(row, first=columns.formats) == TEXT
    return False


def _text_rows(path: Path, name: str) -> Iterator[Row]:
    """The one row of a text file: its text, with LF for CRLF and CR, without byte order mark."""
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        yield name, BadRow(f"a document of {size:,} bytes; the limit is {MAX_TEXT_BYTES:,}: cut it into several")
        return
    # Bytes that are not UTF-8 become lone surrogates, which the format check refuses.
    yield name, {TEXT: path.read_text(encoding="utf-8-sig", errors="surrogateescape")}


READERS = {
    ".json": iter_json,
    ".jsonl": iter_lines,
    ".csv": iter_csv,
    ".parquet": iter_parquet,
    TEXT_SUFFIX: _text_rows,
}
"""Ending of a file -> how its rows are read."""
SUPPORTED = ", ".join(sorted(READERS))
