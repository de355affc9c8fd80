"""Strict reading of JSON rows: every problem has its place, and a row that cannot be read is a bad row."""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftmix.common.errors import DataError
from sftmix.common.shown import quoted

MAX_ROW_BYTES = 16 << 20
"""Longest line or array element that is read; a longer one is a bad row."""

_SPACE = re.compile(r"[ \t\r\n]*")
_FOREIGN = {codecs.BOM_UTF16_LE: "UTF-16 text", codecs.BOM_UTF16_BE: "UTF-16 text", b"\x1f\x8b": "gzip-compressed"}


class BadRow(ValueError):
    """Reason why a row cannot be used, for a message `file:line: reason`."""


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
            ((name, _),) = Counter(key for key, _ in pairs).most_common(1)
            self._problem = BadRow(f"the key {quoted(name)} occurs twice in one object")
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
            return BadRow(f"not valid UTF-8: byte 0x{raw[error.start]:02x}; save the file as UTF-8")
        except json.JSONDecodeError as error:
            return BadRow(f"not valid JSON: {error.msg} (column {error.colno})")
        except RecursionError:
            return BadRow("not valid JSON: nested too deeply")
        except ValueError as error:  # a number of too many digits
            return BadRow(f"not valid JSON: {error}")


def foreign_encoding(head: bytes) -> BadRow | None:
    """Refuse a file by its first bytes; None for one that may be UTF-8 text."""
    for mark, kind in _FOREIGN.items():
        if head.startswith(mark):
            return BadRow(f"{kind}; expected UTF-8 text")
    return None


def iter_json(path: Path, name: str) -> Iterator[Row]:
    """Rows of a .json file: elements of an array where the file begins with `[`, else one row a line."""
    with open(path, "rb") as file:
        is_array = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    return _array(path, name) if is_array else iter_lines(path, name)


def iter_lines(path: Path, name: str) -> Iterator[Row]:
    """Rows of a JSONL file; blank lines, CRLF and a UTF-8 byte order mark are fine."""
    decoder, number = StrictDecoder(), 0
    with open(path, "rb") as file:
        head = file.read(4)
        if problem := foreign_encoding(head):
            yield f"{name}:1", problem
            return
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        while raw := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(raw) > MAX_ROW_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_ROW_BYTES)
                yield f"{name}:{number}", BadRow(f"a line of more bytes than the limit, {MAX_ROW_BYTES:,}")
            elif raw.strip():
                yield f"{name}:{number}", decoder.decode_line(raw)


def _array(path: Path, name: str) -> Iterator[Row]:
    """Elements of an array, each with the line at which it begins; and its index, if another row ends on that line.

    The text is in memory as a whole. Raises DataError at the first syntax error: behind it, nothing shows where the
    next row begins.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not valid UTF-8; save the file as UTF-8") from error
    del raw
    breaks = [match.start() for match in re.finditer("\n", text)]

    def line_of(at: int) -> int:
        return bisect_left(breaks, at) + 1

    def broken(at: int, reason: str) -> DataError:
        return DataError(f"{name}:{line_of(at)}: not valid JSON: {reason}. Nothing after this place can be read.")

    decoder, index, last_line = StrictDecoder(), 0, 0
    at = _skip(text, _skip(text, 0) + 1)
    mark = text[at : at + 1]
    while mark != "]":
        line = line_of(at)
        try:
            value, end = decoder.decode_at(text, at)
        except RecursionError:
            raise broken(at, "nested too deeply") from None
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from error
        except ValueError as error:  # a number of too many digits
            raise broken(at, str(error)) from error
        if end - at > MAX_ROW_BYTES:
            value = BadRow(f"a row of {end - at:,} characters; the limit is {MAX_ROW_BYTES:,}")
        yield f"{name}:{line}[{index}]" if line == last_line else f"{name}:{line}", value
        last_line, index = line_of(end), index + 1
        at = _skip(text, end)
        mark = text[at : at + 1]
        if mark == ",":
            at = _skip(text, at + 1)
        elif mark != "]":
            raise broken(at, f"expected ',', found {mark!r}" if mark else "the file ends within the array")
    if (at := _skip(text, at + 1)) < len(text):
        raise broken(at, "text after the end of the array")


def _skip(text: str, at: int) -> int:
    """Return the place of the next character that is no white space."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]
