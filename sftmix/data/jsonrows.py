"""Reading of JSON rows: every problem has its place, and a row that cannot be read is a bad row."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftmix.common.errors import DataError

MAX_ROW_BYTES = 16 << 20
"""Longest line or array element that is read; a longer one is a bad row."""

_SPACE = re.compile(r"[ \t\r\n]*")


class BadRow(ValueError):
    """Reason why a row cannot be used, for a message `file:line: reason`."""


Row = tuple[str, Any]
"""The place of a row (`file:line`, `file:line[index]` or `file[index]`, the index from 0), and its value or the BadRow
that says why it has none."""


def iter_json(path: Path, name: str) -> Iterator[Row]:
    """Rows of a .json file: elements of an array where the file begins with `[`, else one row a line."""
    with open(path, "rb") as file:
        is_array = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    return _array(path, name) if is_array else iter_lines(path, name)


def iter_lines(path: Path, name: str) -> Iterator[Row]:
    """Rows of a JSONL file; blank lines, CRLF and a UTF-8 byte order mark are fine."""
    number = 0
    with open(path, "rb") as file:
        while raw := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(raw) > MAX_ROW_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_ROW_BYTES)
                yield f"{name}:{number}", BadRow(f"a line of more bytes than the limit, {MAX_ROW_BYTES:,}")
            elif raw.strip():
                yield f"{name}:{number}", _decoded(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw)


def _decoded(raw: bytes) -> Any:
    """Decode the one JSON value of a line; return it or a BadRow."""
    try:
        return json.loads(raw.decode().rstrip("\r\n"))  # a column counts from the last newline
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8, syntax, a number of too many digits
        return BadRow(f"not valid JSON in UTF-8: {error}")


def _array(path: Path, name: str) -> Iterator[Row]:
    """Elements of an array, each with the line at which it begins; and its index, if another row ends on that line.

    The text is in memory as a whole. Raises DataError at the first syntax error: behind it, nothing shows where the
    next row begins.
    """
    decoder = json.JSONDecoder()
    at, index, last_line, line = 0, 0, 0, 1

    def go_to(place: int) -> None:
        nonlocal at, line
        at, line = place, line + text.count("\n", at, place)

    try:
        # Bytes that are not UTF-8 become lone surrogates, which the format check refuses with the row's line.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        go_to(_skip(text, _skip(text, 0) + 1))
        while index or text[at : at + 1] != "]":  # behind a comma a row must follow
            value, end = decoder.raw_decode(text, at)
            if end - at > MAX_ROW_BYTES:
                value = BadRow(f"a row of {end - at:,} characters; the limit is {MAX_ROW_BYTES:,}")
            yield f"{name}:{line}[{index}]" if line == last_line else f"{name}:{line}", value
            go_to(end)
            index, last_line = index + 1, line
            comma = _skip(text, at)
            if text[comma : comma + 1] != ",":
                break
            go_to(_skip(text, comma + 1))
        at = _skip(text, at)
        if text[at : at + 1] != "]" or _skip(text, at + 1) < len(text):
            raise json.JSONDecodeError("neither ',' nor the end of the array stands after a row", text, at)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        raise DataError(f"{name}:{line}: not valid JSON: {error}. Nothing after it can be read.") from error


def _skip(text: str, at: int) -> int:
    """Return the place of the next character that is no white space."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]
