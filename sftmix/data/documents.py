"""Documents of plain text on disk: read from text files and rows, kept in pieces, so that none is held in memory."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sftmix.common.errors import DataError
from sftmix.common.progress import progress_bar
from sftmix.data.arrow import RowFile, RowWriter
from sftmix.data.conversations import Conversations, ConversationWriter
from sftmix.data.formats import TEXT, BadRow, Conversation, document, recognise
from sftmix.data.jsonrows import iter_text
from sftmix.data.sources import Source
from sftmix.types import Rows

PIECE = 1 << 16
"""Characters of a document in one record."""

SCHEMA = pa.schema([("text", pa.string())])


class DocumentWriter:
    """Streams documents into `directory`: what stands beside the text as `Conversations`, the text in pieces."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._about = ConversationWriter(directory)
        self._pieces = RowWriter(directory / "pieces.arrow", SCHEMA)
        self._written = 0
        self._extents = array("q")

    def __enter__(self) -> DocumentWriter:
        self._about.__enter__()
        self._pieces.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._about.__exit__(*error)
        self._pieces.__exit__(*error)

    def add(self, about: Conversation, pieces: Iterable[str], source: str) -> bool:
        """Write a document; False, and it does not count, when it holds nothing but white space."""
        digest, first, size, blank = hashlib.blake2b(digest_size=8), self._written, 0, True
        for piece in pieces:
            digest.update(piece.encode())
            blank = blank and not piece.strip()
            size += len(piece)
            self._pieces.add({"text": piece})
            self._written += 1
        if blank:
            return False
        self._about.add(about, source, [], content=digest.hexdigest())
        self._extents.extend((first, self._written, size))
        return True

    def finish(self) -> tuple[Rows, Rows]:
        """After the last document: (records whose explicit id is taken, records that repeat an earlier document)."""
        extents = np.frombuffer(self._extents, dtype=np.int64).reshape(-1, 3)
        np.save(self._directory / "extents.npy", extents, allow_pickle=False)
        return self._about.finish()


class Documents(Conversations):
    """Random access to the documents of a directory: id, source, label, columns as of conversations, and the text."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._pieces = RowFile(directory / "pieces.arrow")
        self._extents = np.load(directory / "extents.npy", mmap_mode="r", allow_pickle=False)

    def characters(self, record: int) -> int:
        return int(self._extents[record, 2])

    def text(self, record: int, start: int = 0, end: int | None = None) -> Iterator[str]:
        """The characters [start, end) of a document, in pieces."""
        end = self.characters(record) if end is None else end
        place = 0
        for number in range(int(self._extents[record, 0]), int(self._extents[record, 1])):
            if place >= end:
                return
            piece = str(self._pieces.cell(number, "text").as_py())
            if place + len(piece) > start:
                yield piece[max(start - place, 0) : end - place]
            place += len(piece)

    def tail(self, record: int, share: float) -> int:
        """Where about the last `share` of a document begins: behind the first newline there, or the very place."""
        place = round((1 - share) * self.characters(record))
        ahead = "".join(itertools.islice(self.text(record, place), 2))
        newline = ahead.find("\n")
        after = place + newline + 1
        return after if newline >= 0 and after < self.characters(record) else place


def holds_text(sources: Sequence[Source], form: str, option: str) -> bool:
    """Whether these sources hold documents (data.format text, or recognised as such) and not conversations.

    Raises DataError where one option names both kinds, or a text file under another format.
    """
    if form == TEXT:
        return True
    is_text = [source.is_text or (form == "auto" and _begins_with_text(source)) for source in sources]
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


def _begins_with_text(source: Source) -> bool:
    """Whether the first row is recognised as text; what is wrong with a file its reader will say."""
    try:
        first = next(source.rows(), None)
        return first is not None and isinstance(first.value, dict) and recognise(first.value) == TEXT
    except (OSError, DataError, BadRow):
        return False


def read_documents(
    sources: Sequence[Source], label_field: str | None, progress: bool
) -> Iterator[tuple[str, Conversation | BadRow, Iterator[str]]]:
    """(source, what stands beside the text or the BadRow that says why not, pieces of the text) of every document.

    The pieces of a text file may raise BadText half-way.
    """
    with progress_bar("Reading documents", unit=" documents", delay=1, enabled=progress) as bar:
        for source in sources:
            if source.is_text:
                bar.update()
                yield _text_file(source, label_field)
                continue
            for row in source.rows():
                bar.update()
                try:
                    if row.problem is not None:
                        raise BadRow(row.problem)
                    text, about = document(row.value, label_field)
                    yield row.source, about, _cut(text)
                except BadRow as problem:
                    yield row.source, problem, iter(())


def _text_file(source: Source, label_field: str | None) -> tuple[str, Conversation | BadRow, Iterator[str]]:
    if label_field is not None:
        return source.name, BadRow(f"a text file has no field {label_field!r} (data.label_field)"), iter(())
    return source.name, Conversation(()), iter_text(Path(source.name).expanduser(), source.name)


def _cut(text: str) -> Iterator[str]:
    return (text[at : at + PIECE] for at in range(0, len(text), PIECE))
