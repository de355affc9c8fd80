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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        ((name, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise BadRow(f"the key {quoted(name)} occurs twice in one object")
    return value


def _constant(name: str) -> None:
    raise BadRow(f"{name} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
"""Decoder that raises BadRow for duplicate keys, NaN and Infinity, which Python's own accepts."""


def decode_line(raw: bytes) -> Any:
    """Decode the one JSON value of a line; return it or a BadRow."""
    try:
        return _STRICT.decode(raw.decode("utf-8").rstrip("\r\n"))  # a column counts from the last newline
    except BadRow as problem:
        return problem
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
    number = 0
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
                yield f"{name}:{number}", decode_line(raw)


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
    at, index, last_line, line = _skip(text, _skip(text, 0) + 1), 0, 0, 1
    try:
        while index or text[at : at + 1] != "]":  # behind a comma a row must follow
            line = bisect_left(breaks, at) + 1
            try:
                value, end = _STRICT.raw_decode(text, at)
            except BadRow as problem:
                value, end = problem, json.JSONDecoder().raw_decode(text, at)[1]
            if end - at > MAX_ROW_BYTES:
                value = BadRow(f"a row of {end - at:,} characters; the limit is {MAX_ROW_BYTES:,}")
            yield f"{name}:{line}[{index}]" if line == last_line else f"{name}:{line}", value
            index, last_line, at = index + 1, bisect_left(breaks, end) + 1, _skip(text, end)
            if text[at : at + 1] != ",":
                break
            at = _skip(text, at + 1)
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("neither ',' nor ']' stands after a row", text, at)
        if (end := _skip(text, at + 1)) < len(text):
            raise json.JSONDecodeError("text after the end of the array", text, end)
    except (ValueError, RecursionError) as error:  # of a number of too many digits, too
        if isinstance(error, json.JSONDecodeError):
            line, reason = error.lineno, error.msg
        else:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{name}:{line}: not valid JSON: {reason}. Nothing after this place can be read.") from error


def _skip(text: str, at: int) -> int:
    """Return the place of the next character that is no white space."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]
