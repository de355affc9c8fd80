"""Rows of a file: JSON arrays, JSON lines, CSV, Parquet, Arrow and text.

Every problem has its place. A row of JSON or CSV that cannot be read is a bad row; a table that cannot be read ends the
reading.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftmix.common.files import decoded
from sftmix.data.formats import TEXT
from sftmix.data.values import BadRow

MAX_CELL = 16 << 20
"""Most characters of a cell of CSV: an open quote would else take in the rest of the file."""

MAX_TEXT_BYTES = 64 << 20
"""Size of the largest text file: it is one document, which is tokenised in one call, in some 150 times its size."""


Row = tuple[str, Any]
"""The place of a row in its source (`:line`, `:line[index]` or `[index]`, the index from 0), and its value or the
BadRow that says why it has none. A reader raises BadRow, with the place, if nothing more can be read."""


def _json(path: Path) -> Iterator[Row]:
    """Rows of a .json file: elements of an array if the file begins with `[`, else one row a line."""
    with open(path, encoding="utf-8-sig", errors="ignore") as file:
        is_array = file.read(1024).lstrip()[:1] == "["
    return _array(path) if is_array else _lines(path)


def _lines(path: Path) -> Iterator[Row]:
    """Rows of a JSONL file; blank lines, CRLF and a UTF-8 byte order mark are fine."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if line.strip() == b"{":
                raise BadRow(f":{number}: an object over several lines; write rows as the file's list, or one a line")
            try:
                row = json.loads(decoded(line).rstrip())
            except (ValueError, RecursionError) as error:  # not UTF-8, syntax, a number of too many digits
                row = BadRow(f"not valid JSON in UTF-8: {error}")
            yield f":{number}", row


_BEGIN = re.compile(r"[ \t\r\n]*\[(?![ \t\r\n]*\])[ \t\r\n]*")
_NEXT = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
_END = re.compile(r"[ \t\r\n]*\[?[ \t\r\n]*\][ \t\r\n]*\Z")
"""What is before the first element of an array, between two, and after the last; an empty array is all end."""


def _array(path: Path) -> Iterator[Row]:
    """Elements of an array, each with the line at which it begins; and its index, if another row ends on that line.

    The text is in memory as a whole. Nothing is read behind the first syntax error, as nothing shows where the next row
    begins.
    """
    # Bytes that are not UTF-8 become lone surrogates, which the format check refuses with the row's line.
    text = decoded(path.read_bytes(), "surrogateescape")
    decoder = json.JSONDecoder()
    at = 0
    index = 0
    line = 1
    last_line = 0
    try:
        while mark := (_NEXT if index else _BEGIN).match(text, at):
            line += text.count("\n", at, mark.end())
            row, at = decoder.raw_decode(text, mark.end())
            yield f":{line}[{index}]" if line == last_line else f":{line}", row
            line += text.count("\n", mark.end(), at)
            index, last_line = index + 1, line
        if not _END.match(text, at):
            at = len(text) - len(text[at:].lstrip(" \t\r\n"))
            raise json.JSONDecodeError("neither ',' nor the end of the array stands after a row", text, at)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        raise BadRow(f":{line}: not valid JSON: {error}. Nothing after it can be read.") from error


def _csv(path: Path) -> Iterator[Row]:
    """Rows of a CSV file under the names of its first row; a quoted cell may hold several lines."""
    csv.field_size_limit(MAX_CELL)
    with open(path, "rb") as head:
        decoded(head.read(4), "ignore")  # raises the error of another encoding
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = None
        while True:
            place = f":{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, BadRow(f"not valid CSV: {error}")
                continue
            if header is None:
                header = cells
            elif len(cells) == len(header):
                yield place, dict(zip(header, cells, strict=True))
            elif cells:
                yield place, BadRow(f"{len(cells)} fields, but the header has {len(header)}")


def rows_of_table(table: Any) -> Iterator[Row]:
    """Rows of a Parquet or Arrow file or of a hub dataset under their numbers."""
    read = 0
    try:
        for row in _rows_of_file(table) if isinstance(table, Path) else _without_media(table):
            yield f"[{read}]", row
            read += 1
    except Exception as error:  # decoders raise errors of many libraries: a text that is not UTF-8, a broken image
        raise BadRow(f": cannot be read behind its first {read:,} rows: {error}") from error


def _rows_of_file(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, or of an Arrow file of datasets; maps become dicts, and texts of the type JSON values."""
    if path.suffix.lower() == ".arrow":
        from datasets import Dataset

        yield from _without_media(Dataset.from_file(str(path)))
        return
    from pyarrow import OSFile, Table, parquet  # by its path alone, s3:x.parquet would be a place on the web

    for batch in parquet.ParquetFile(OSFile(str(path))).iter_batches(batch_size=1024):
        if "arrow.json" in str(batch.schema):  # pyarrow would leave the text
            from datasets import Dataset

            yield from _without_media(Dataset(Table.from_batches([batch])))
        else:
            yield from batch.to_pylist(maps_as_pydicts="lossy")


def _without_media(table: Any) -> Any:
    """Return a table of datasets that decodes no images or sound: it would open the files and addresses in the rows."""
    table.info.features = type(table.features)(_undecoded(dict(table.features)))
    return table


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):  # of a list
        return replace(feature, feature=_undecoded(feature.feature))
    # JSON is decoded to the values of a row, and opens nothing.
    media = getattr(feature, "decode", False) and type(feature).__name__ != "Json"
    return replace(feature, decode=False) if media else feature


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
