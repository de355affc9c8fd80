"""Documents of plain text on disk, in pieces, so that no document is ever in memory as a whole."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from sftmix.data.conversations import Conversations, ConversationWriter
from sftmix.data.store import RowFile, RowWriter
from sftmix.types import Example, Int64

PIECE = 1 << 16
"""Most characters of a piece."""

SCHEMA = pa.schema([("text", pa.string())])


class DocumentWriter(ConversationWriter):
    """Writer of documents to `directory`: the text, and beside it all that a ConversationWriter writes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._pieces = self.enter_context(RowWriter(directory / "pieces.arrow", SCHEMA))
        self._written = 0
        self._extents = array("q")

    def add_text(self, example: Example, text: Iterable[str]) -> bool:
        """Write a document; return False, and leave it out, if it holds only white space.

        text  its text in pieces of any length
        """
        digest, first, size, blank = hashlib.blake2b(digest_size=8), self._written, 0, True
        for piece in (part[at : at + PIECE] for part in text for at in range(0, len(part), PIECE)):
            digest.update(piece.encode())
            blank = blank and not piece.strip()
            size += len(piece)
            self._pieces.add({"text": piece})
            self._written += 1
        if blank:
            return False
        self.add(example, [], digest.hexdigest())
        self._extents.extend((first, self._written, size))
        return True

    def finish(self) -> tuple[Int64, Int64]:
        """Number repeated ids; return what `ConversationWriter.finish` returns."""
        extents = np.frombuffer(self._extents, dtype=np.int64).reshape(-1, 3)
        np.save(self.directory / "extents.npy", extents, allow_pickle=False)
        return super().finish()


class Documents(Conversations):
    """The documents of one side: id, source, label and columns like those of conversations, and the text.

    parts  i64[n, 2], the characters [start, end) of each record that belong to this side; at first all of them
    """

    def __init__(self, directory: Path, fingerprint: str = "", cache_key: str = "") -> None:
        super().__init__(directory, fingerprint, cache_key)
        self._pieces = RowFile(directory / "pieces.arrow")
        self._extents = np.load(directory / "extents.npy", mmap_mode="r", allow_pickle=False)
        ends = np.asarray(self._extents[self.records, 2])
        self.parts: Int64 = np.stack([np.zeros_like(ends), ends], axis=1)

    def some(self, records: Int64) -> Documents:
        """Make a side of these records, which are some of its own."""
        side = super().some(records)
        side.parts = self.parts[np.searchsorted(self.records, records)]
        return side

    def some_parts(self, records: Int64, parts: Int64) -> Documents:
        """Make a side of these parts of these records."""
        side = self._side(records, np.concatenate([records, parts.reshape(-1)]))
        side.parts = parts
        return side

    def characters(self, record: int) -> int:
        """Length of a whole document, with the parts of the other side."""
        return int(self._extents[record, 2])

    def text(self, record: int, start: int = 0, end: int | None = None) -> Iterator[str]:
        """Read the characters [start, end) of a document, in pieces."""
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
        """Find where about the last `share` of a document begins: behind the next newline, if there is one near."""
        place = round((1 - share) * self.characters(record))
        ahead = "".join(itertools.islice(self.text(record, place), 2))
        newline = ahead.find("\n")
        after = place + newline + 1
        return after if newline >= 0 and after < self.characters(record) else place
