"""Sources of rows: JSON arrays, JSONL, Parquet, CSV, text files, directories of these files, and hub ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sftmix.common.errors import DataError
from sftmix.common.files import sha256_file
from sftmix.common.names import HUB_ID
from sftmix.data.columns import Columns
from sftmix.data.formats import TEXT, recognise
from sftmix.data.jsonrows import BadRow, Row, iter_json, iter_lines
from sftmix.data.tablerows import iter_csv, iter_hub, iter_parquet
from sftmix.data.textrows import iter_text

V = TypeVar("V")
TEXT_SUFFIX = ".txt"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4")

NAMED = 5
"""Entries of a directory that the note on those left out names; the others are counted."""

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
        if self.dataset is not None:
            return _readable(iter_hub(self.dataset, self.name), self.name)
        path = Path(self.name).expanduser()
        return _readable(READERS[path.suffix.lower()](path, self.name), self.name)


def _readable(parts: Iterator[V], name: str) -> Iterator[V]:
    """Yield the parts as they are; raise a DataError that names the file if it cannot be read."""
    with _reading(name):
        yield from parts


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
        label = None if labels is None else labels[place]
        with _reading(f"{option}: {name}"):
            files = _files(name, option, form)
            if files is None:
                sources.append(replace(_hub(name, option), label=label, entry=place))
            sources += [Source(shown, sha256_file(path), None, label, place) for path, shown in files or ()]
    return sources


def check_names(names: Sequence[str], option: str, form: str = "auto") -> None:
    """Raise the errors of `expand` that need no look into a file or at the hub; its arguments are the same."""
    for name in names:
        with _reading(f"{option}: {name}"):
            _files(name, option, form)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _files(name: str, option: str, form: str) -> list[tuple[Path, str]] | None:
    """Return the files behind a name, each with its name in messages; None if the name is a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        read = _read_of(path, form)
        if not read:
            raise DataError(f"{option}: {name}: no file ending in {SUPPORTED} in this directory")
        # Compressed ones are among them, so that they are refused: rows.jsonl.gz and its like.
        read += [p for p in path.iterdir() if p.suffix.lower() in COMPRESSED and Path(p.stem).suffix.lower() in READERS]
        files = [(child, str(Path(name) / child.name)) for child in sorted(read)]
    elif path.exists():
        files = [(path, name)]
    elif may_be_of_the_hub(name):
        return None
    else:
        seen = "" if path.is_absolute() else f" (from the working directory, {Path.cwd()})"
        raise DataError(f"{option}: {name}: no such file or directory{seen}; name a file, a directory or a hub id")
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


def left_out(names: Sequence[str], form: str) -> list[str]:
    """Return a note for each directory among the names with entries that are not read; hidden ones are not told."""
    notes = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            read = set(_read_of(path, form))
            others = sorted(child for child in path.iterdir() if child not in read and not child.name.startswith("."))
            named = [f"{child.name}/" if child.is_dir() else child.name for child in others[:NAMED]]
            named += ["..."] if len(others) > NAMED else []
            notes += [f"{name}: {len(others):,} left out of this directory: {', '.join(named)}"] if others else []
    return notes


def may_be_of_the_hub(name: str) -> bool:
    """Return True for a name that is no file here and could be an id of the hub: not `rows.jsonl`."""
    return hub_parts(name) is not None and Path(name).suffix.lower() not in READERS


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
        reason = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise DataError(
            f"{option}: {name}: there is no such file, and as a Hugging Face hub id (NAME:SUBSET@SPLIT) it cannot be "
            f"loaded: {reason}. Check the spelling; without a network, download the dataset's files and name them "
            "instead."
        ) from error
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"{option}: {name}: streaming datasets are not supported: the median split needs every score")
    return Source(name, str(dataset._fingerprint), dataset)


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
    """True if the first row of a known format is text; bad rows before it say nothing about the others."""
    with suppress(DataError):  # it is raised again where the rows are read
        for _, found in source.rows():
            if isinstance(row := columns.renamed(found), dict):
                with suppress(BadRow):
                    return recognise(row, first=columns.formats) == TEXT
    return False


def _text_rows(path: Path, name: str) -> Iterator[Row]:
    """The one row of a text file; its field `text` is an iterator of pieces."""
    yield name, {"text": _readable(iter_text(path, name), name)}


READERS = {
    ".json": iter_json,
    ".jsonl": iter_lines,
    ".csv": iter_csv,
    ".parquet": iter_parquet,
    TEXT_SUFFIX: _text_rows,
}
"""Ending of a file -> how its rows are read."""
SUPPORTED = ", ".join(sorted(READERS))
