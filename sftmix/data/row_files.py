"""Rows of a file: JSON arrays, JSON lines, CSV, Parquet, Arrow and text.

Every problem has its place. A row of JSON, CSV or Parquet that cannot be read is a bad row; a table that cannot be read
ends the reading.
"""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftmix.disk.texts import decoded
from sftmix.text.values import JSON
from sftmix.words.errors import BadRow
from sftmix.words.fields import TEXT
from sftmix.words.shown import quoted

MAX_ROW = 16 << 20
"""Most characters in a row, and bytes in a line of JSON: a cell of CSV with an open quote would take in all of it."""

MAX_TEXT_BYTES = 64 << 20
"""Size of the largest text file: it is one document, which is tokenised in one call, in some 150 times its size."""


MANY_LINES = 50
"""Most lines of a row of CSV that is not reported: behind an open quote, as of 5", many rows are one answer."""

ABSENT = ("NaN", "nan", "NULL", "null")
"""Cells of CSV that are empty, in any column: what pandas and databases write for a field that a row lacks."""


Row = tuple[str, Any]
"""The place of a row in its source (`:line`, or `[index]` from 0), and its value or the BadRow that says why it has
none. A reader raises BadRow, with the place, if nothing more can be read."""

_HEADER = "; put quotes around a cell with a comma, and no title above the names"
_OVER_LINES = "; a value over several lines is no JSON lines: write each row in one line, or an array in a .json file"


def _json(path: Path) -> Iterator[Row]:
    """Rows of a .json file: elements of an array if the file begins with `[`, else one row a line."""
    with open(path, encoding="utf-8-sig", errors="ignore") as file:
        is_array = file.read(1024).lstrip()[:1] == "["
    return _array(path) if is_array else _lines(path)


def _lines(path: Path) -> Iterator[Row]:
    """Rows of a JSONL file; blank lines, CRLF and a UTF-8 byte order mark are fine."""
    with open(path, "rb") as file:  # bytes: a line that is not UTF-8 is one bad row, and the next ones are read
        for number in itertools.count(1):
            if not (line := file.readline(MAX_ROW + 1)):
                return
            row: Any = None
            if len(line) > MAX_ROW:
                row = BadRow(f"a line of over {MAX_ROW:,} bytes")  # the rest is passed over in pieces
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_ROW)
            elif not line.strip():
                continue
            else:
                try:
                    row = JSON.decode(decoded(line).rstrip())
                    if isinstance(row, list):
                        row = BadRow("a list, and a line is one row; a file with one array of rows ends in .json")
                except (ValueError, RecursionError) as error:  # not UTF-8, syntax, a number of too many digits
                    # json.dump(row, file, indent=2): the first line is "{" alone.
                    begins = line.strip().removeprefix(b"\xef\xbb\xbf") in (b"{", b"[")
                    row = BadRow(f"not valid JSON in UTF-8: {error}{_OVER_LINES if begins else ''}")
            yield f":{number}", row


def _array(path: Path) -> Iterator[Row]:
    """Elements of an array under their indices. The text is in memory as a whole, and has no rows if it is broken."""
    # Bytes that are not UTF-8 become lone surrogates, which the format check refuses with the row's place.
    text = decoded(path.read_bytes(), "surrogateescape")
    try:
        rows = JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f": not valid JSON: {error}; of JSON lines, bad ones can be skipped") from error
    for index, row in enumerate(rows):
        yield f"[{index}]", row


class _Lines:
    """The lines of a file, with the number of the last one and the quotes since somebody has set them to 0."""

    def __init__(self, file: Iterable[str]) -> None:
        self._file = iter(file)
        self.number = self.quotes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.number += 1
        self.quotes += line.count('"')
        return line


def _csv(path: Path) -> Iterator[Row]:
    """Rows of a CSV file under the names of its first row; a quoted cell may hold several lines."""
    csv.field_size_limit(MAX_ROW)  # 131,072 otherwise
    with open(path, "rb") as head:
        decoded(head.read(4), "ignore")  # raises the error of another encoding
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)  # else '"a"b' is read as ab
        header = next(filter(None, reader), [])  # a blank line is []
        top = lines.number
        _check_header(header, top)
        while True:
            first, lines.quotes = lines.number + 1, 0  # before it is read: a quoted cell may go over several lines
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = f"not valid CSV (quotes inside a cell are doubled): {error}"
                yield f":{first}", BadRow(f"{problem}{_through(first, lines.number)}")
                # An odd number of quotes leaves the cell open: what follows, up to its end, would be read as rows.
                while lines.quotes % 2 and next(lines, ""):
                    problem = f"behind the broken quote of line {first:,}, perhaps of the same cell"
                    yield f":{lines.number}", BadRow(problem)
                continue
            if len(cells) == len(header):
                row = {name: "" if cell in ABSENT else cell for name, cell in zip(header, cells, strict=True)}
                yield f":{first}", row
            elif cells:  # not of a blank line, []
                problem = f"{len(cells)} fields, but the header (line {top}) has {len(header)}{_HEADER}"
                yield f":{first}", BadRow(f"{problem}{_through(first, lines.number)}")


def _check_header(names: list[str], line: int) -> None:
    """Raise BadRow for a column that is there twice, or columns that something else than commas separates."""
    _check_names(names)
    # "instruction;output": Excel, in countries whose numbers have a comma.
    if len(names) == 1 and (other := re.search(r"[;\t|]", names[0])):
        raise BadRow(
            f":{line}: the only column is {quoted(names[0])}: fields are separated by commas, not by {other[0]!r}; "
            "save the file anew"
        )


def _through(first: int, last: int) -> str:
    """Name the lines of a row, which an open quote takes in; "" for a row in one line."""
    return f" (lines {first:,} to {last:,})" if last > first else ""


def has_many_lines(row: dict[str, str]) -> bool:
    """Return True if a row of CSV goes over more than MANY_LINES."""
    return "".join(row.values()).count("\n") >= MANY_LINES


def _check_names(names: list[str]) -> None:
    """Raise BadRow for a column that is there twice: rows would have the last one."""
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise BadRow(f": the column {quoted(repeated[0])} is there twice; give each a name of its own")


def characters(value: Any) -> int:
    """Count the characters of all texts in a row."""
    if isinstance(value, str | bytes):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(characters, inner))


def rows_of_table(table: Any) -> Iterator[Row]:
    """Rows of a Parquet or Arrow file or of a hub dataset under their numbers."""
    read = 0
    try:
        for row in _rows_of_file(table) if isinstance(table, Path) else _without_media(table):
            yield f"[{read}]", row
            read += 1
    except BadRow:
        raise
    except Exception as error:  # decoders raise errors of many libraries: a text that is not UTF-8, a broken image
        raise BadRow(f": cannot be read behind its first {read:,} rows: {error}") from error


def _rows_of_file(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, or of an Arrow file of datasets; maps become dicts, and texts of the type JSON values."""
    if path.suffix.lower() == ".arrow":
        from datasets import Dataset

        yield from _without_media(Dataset.from_file(str(path)))
        return
    from pyarrow import OSFile, Table, parquet  # by its path alone, s3:x.parquet would be a place on the web

    table = parquet.ParquetFile(OSFile(str(path)))
    _check_names(table.schema_arrow.names)
    for batch in table.iter_batches(batch_size=1024):
        if "arrow.json" in str(batch.schema):  # pyarrow would leave the text
            from datasets import Dataset

            yield from _without_media(Dataset(Table.from_batches([batch])))
        else:
            yield from _of_batch(batch)


def _of_batch(batch: Any) -> list[Any]:
    """Return the rows of some lines of a Parquet file; BadRow, with the column, for those with a value that is none."""
    try:
        return list(batch.to_pylist(maps_as_pydicts="strict"))  # else a map is [(key, value), ...]
    except Exception:  # a map with a key twice, a date beyond the year 9999, a zone of time that nobody knows
        return [_of_line(batch.slice(line, 1)) for line in range(len(batch))]


def _of_line(batch: Any) -> dict[str, Any] | BadRow:
    """Return the only row of a batch, or why it has none."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            (row[name],) = column.to_pylist(maps_as_pydicts="strict")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return BadRow(f"column {quoted(name)} cannot be read ({reason}); mend the value, or leave out the column")
    return row


def _without_media(table: Any) -> Iterator[Any]:
    """Rows of a table of datasets, without its images and sound decoded, which would open the files that rows name."""
    problems = list[BadRow]()

    def value(text: str | None, **_: Any) -> Any:
        """Return what a text of JSON says; remember what is wrong with it."""
        try:
            return None if text is None else JSON.decode(text)
        except (ValueError, RecursionError) as error:
            problems.append(BadRow(f"not valid JSON: {error}"))

    def undecoded(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {name: undecoded(inner) for name, inner in feature.items()}
        if hasattr(feature, "feature"):  # of a list
            return replace(feature, feature=undecoded(feature.feature))
        if type(feature).__name__ == "Json":  # it opens nothing, but takes the last value of a key that is there twice
            feature = replace(feature)
            feature.decode_example = value
            return feature
        return replace(feature, decode=False) if getattr(feature, "decode", False) else feature

    # {"image": Image(decode=True)} -> Image(decode=False), whose values are {"bytes": ..., "path": ...}
    table.info.features = type(table.features)(undecoded(dict(table.features)))
    for row in table:
        yield problems[0] if problems else row
        problems.clear()


def _text(path: Path) -> Iterator[Row]:
    """The one row of a text file: its text, with LF for CRLF and CR, without byte order mark."""
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        yield "", BadRow(f"a document of {size:,} bytes; the limit is {MAX_TEXT_BYTES:,}: cut it into several")
    else:
        yield "", {TEXT: decoded(path.read_bytes(), "surrogateescape")}


READERS = {
    ".json": _json,
    ".jsonl": _lines,
    ".csv": _csv,
    ".parquet": rows_of_table,
    ".arrow": rows_of_table,
    ".txt": _text,
}
"""Ending of a file -> function: its path -> its rows."""
SUPPORTED = ", ".join(sorted(READERS))
