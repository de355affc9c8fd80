"""Strict reading of JSON rows: every problem has a line number, and no file is ever in memory as a whole."""

from __future__ import annotations

import codecs
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sftmix.common.errors import DataError
from sftmix.common.shown import quoted

MAX_ROW_BYTES = 16 << 20
"""Longest line or array element that is read; a longer one is a bad row."""

_PIECE = 1 << 20
_UTF8_BOM = codecs.BOM_UTF8
_FOREIGN = {codecs.BOM_UTF16_LE: "UTF-16 text", codecs.BOM_UTF16_BE: "UTF-16 text", b"\x1f\x8b": "gzip-compressed"}


class BadRow(ValueError):
    """Reason why a row cannot be used, for a message `file:line: reason`.

    source   place of the problem; None if it is the place at which the row begins
    mistake  the reason without what is the row's own; two rows with the same one have the same mistake
    """

    def __init__(self, reason: str, source: str | None = None, mistake: str | None = None) -> None:
        super().__init__(reason)
        self.source = source
        self.mistake = reason if mistake is None else mistake


Row = tuple[str, Any]
"""The place of a row (`file:line`, `file:line[index]` or `file[index]`, the index from 0), and its value or the BadRow
that says why it has none."""


class StrictDecoder:
    """JSON decoder that gives a BadRow for duplicate keys, NaN and Infinity, which Python's own decoder accepts."""

    def __init__(self) -> None:
        self._json = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)
        self._problem: BadRow | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            times = Counter(key for key, _ in pairs)
            twice = next(key for key, count in times.items() if count > 1)
            self._problem = BadRow(f"the key {quoted(twice)} occurs twice in one object")
        return value

    def _constant(self, name: str) -> None:
        self._problem = BadRow(f"{name} is not JSON")

    def decode_at(self, text: str, start: int) -> tuple[Any, int]:
        """Decode the JSON value at text[start:] to (value or BadRow, end). Raises ValueError or RecursionError."""
        self._problem = None
        value, end = self._json.raw_decode(text, start)
        return self._problem or value, end

    def decode_line(self, raw: bytes) -> Any:
        """Decode the one JSON value of a line; return it or a BadRow."""
        self._problem = None
        try:
            value = self._json.decode(raw.decode("utf-8").rstrip("\r\n"))  # a column counts from the last newline
            return self._problem or value
        except UnicodeDecodeError as error:
            byte = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
            return BadRow(f"not valid UTF-8: {byte}; save the file as UTF-8", mistake="not valid UTF-8")
        except json.JSONDecodeError as error:
            comma = "; no comma stands after a row" if error.doc[error.pos :].strip() == "," else ""
            return BadRow(f"not valid JSON: {error.msg} (column {error.colno}){comma}", mistake=f"{error.msg}{comma}")
        except RecursionError:
            return BadRow("not valid JSON: nested too deeply")
        except ValueError as error:
            return BadRow(f"not valid JSON: {error}")


def foreign_encoding(head: bytes) -> str | None:
    """Name the kind of a file by its first bytes, for a message; None for a file that may be UTF-8 text."""
    return next((f"{kind}; expected UTF-8 text" for mark, kind in _FOREIGN.items() if head.startswith(mark)), None)


def iter_json(path: Path, name: str) -> Iterator[Row]:
    """Rows of a .json file: elements of an array where the file begins with `[`, else one row a line."""
    with open(path, "rb") as file:
        if file.read(1024).removeprefix(_UTF8_BOM).lstrip()[:1] == b"[":
            file.seek(0)
            yield from _ArrayReader(file, name).rows()
            return
    yield from iter_lines(path, name)


def iter_lines(path: Path, name: str) -> Iterator[Row]:
    """Rows of a JSONL file; blank lines, CRLF and a UTF-8 byte order mark are fine."""
    decoder = StrictDecoder()
    with open(path, "rb") as file:
        head = file.read(4)
        if problem := foreign_encoding(head):
            yield f"{name}:1", BadRow(problem)
            return
        file.seek(len(_UTF8_BOM) if head.startswith(_UTF8_BOM) else 0)
        number = 0
        while raw := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(raw) > MAX_ROW_BYTES:
                size = len(raw) + _skip_line(file, raw)
                yield f"{name}:{number}", BadRow(f"a line of {size:,} bytes; the limit is {MAX_ROW_BYTES:,}")
            elif raw.strip():
                yield f"{name}:{number}", decoder.decode_line(raw)


def _skip_line(file: BinaryIO, raw: bytes) -> int:
    skipped = 0
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(_PIECE)
        skipped += len(raw)
    return skipped


class _ArrayReader:
    """A sliding window over the text of a JSON array.

    Raises DataError at the first syntax error: behind it, nothing shows where the next row begins.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._line = 1
        self._ended = False
        self._index = ""

    def rows(self) -> Iterator[Row]:
        """Elements of the array, each with the line at which it begins; and its index, if it is not the first there."""
        decoder = StrictDecoder()
        self._expect("[")
        if self._next() == "]":
            self._at += 1
        else:
            before = 0  # the line on which the last element ended
            for index in itertools.count():
                self._index = f"[{index}]" if self._line == before else ""
                source = f"{self._name}:{self._line}{self._index}"
                value, end = self._element(decoder)
                yield source, value
                self._advance(end)
                before = self._line
                if self._next() == "]":
                    self._at += 1
                    break
                self._expect(",")
                self._next()
        if self._next():
            self._fail("text after the end of the array")

    def _element(self, decoder: StrictDecoder) -> tuple[Any, int]:
        while True:
            try:
                value, end = decoder.decode_at(self._text, self._at)
                if end < len(self._text) or self._ended:
                    return value, end
            except RecursionError:
                self._fail("nested too deeply")
            except json.JSONDecodeError as error:
                if self._ended:  # else the row may go on
                    self._fail(error.msg, error.lineno)
            except ValueError as error:  # a number of too many digits
                self._fail(str(error))
            if len(self._text) - self._at > MAX_ROW_BYTES:
                self._fail(f"no valid row of at most {MAX_ROW_BYTES:,} bytes begins here")
            self._read(max(_PIECE, len(self._text) - self._at))

    def _next(self) -> str:
        """Skip white space and return the next character, or "" at the end of the file."""
        while True:
            rest = len(self._text)
            end = self._at
            while end < rest and self._text[end] in " \t\r\n":
                end += 1
            self._advance(end)
            if end < rest or self._ended:
                return self._text[end : end + 1]
            self._read(_PIECE)

    def _expect(self, mark: str) -> None:
        if (found := self._next()) != mark:
            self._fail(f"expected {mark!r}, found {found!r}" if found else f"the file ends where {mark!r} is expected")
        self._at += 1

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self, size: int) -> None:
        raw = self._file.read(size)
        self._ended = not raw
        try:
            self._text = self._text[self._at :] + self._decode.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n", self._at) + raw[: error.start].count(b"\n")
            raise DataError(f"{self._name}:{line}: not valid UTF-8; save the file as UTF-8") from error
        self._at = 0

    def _fail(self, reason: str, line_in_text: int | None = None) -> None:
        later = 0 if line_in_text is None else line_in_text - 1 - self._text.count("\n", 0, self._at)
        place = f"{self._name}:{self._line + later}{'' if later else self._index}"
        raise DataError(f"{place}: not valid JSON: {reason}. Nothing after this place can be read.")
