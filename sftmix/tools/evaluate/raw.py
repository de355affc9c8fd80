"""Raw files of benchmarks, JSON or JSONL, read as rows with their places."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, DataError

Raw = tuple[str, Mapping[str, Any]]
"""A raw row with its place, `file:line` or `file: key`."""


def raw_rows(path: Path) -> Iterator[Raw]:
    """Yield the rows of a JSONL file, of a JSON list, or of a JSON object of rows by id.

    Raises ConfigError for a file that cannot be opened, DataError for one that holds no rows.
    """
    pairs = _by_line(path) if path.suffix == ".jsonl" or not _is_json(path) else _by_key(path)
    for place, row in pairs:
        if not isinstance(row, dict):
            raise DataError(f"{place}: {str(row)[:40]!r} is not a row (a JSON object); is it another file than meant?")
        yield place, row


def json_of(path: Path) -> Any:
    """Return the value of a JSON file. Raises as `raw_rows` does."""
    return _parsed(_text(path), str(path))


def _is_json(path: Path) -> bool:
    """Return True for one JSON value, False for a file with a value on each line, or with none."""
    try:
        json_of(path)
    except DataError:
        return False
    return True


def _by_key(path: Path) -> Iterator[tuple[str, Any]]:
    found = json_of(path)
    if not isinstance(found, dict | list):
        raise DataError(
            f"{path}: it is {str(found)[:40]!r}; a JSON list of rows, or an object of rows by id, is needed"
        )
    for key, row in found.items() if isinstance(found, dict) else enumerate(found):
        yield f"{path}: {key}", {"id": key, **row} if isinstance(row, dict) else row


def _by_line(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield a row of each line. Only "\\n" ends a line: other ends of lines, as U+2028, may stand in JSON."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: {error}; a JSON or JSONL file is needed") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a raw file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}; save it as UTF-8") from error
