"""Reading of tables: CSV, Parquet and hub data sets. A row of CSV that cannot be read is a bad row."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftmix.common.errors import DataError
from sftmix.data.jsonrows import MAX_ROW_BYTES, BadRow, Row

_BATCH_ROWS = 1024


def iter_csv(path: Path, name: str) -> Iterator[Row]:
    """Rows of a CSV file under the names of its first row; a quoted cell may hold several lines."""
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        # Bytes that are not UTF-8 become lone surrogates, which the format check refuses with the row's line.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header: list[str] | None = None
            while True:
                place = f"{name}:{reader.line_num + 1}"
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
    finally:
        csv.field_size_limit(limit)


def iter_parquet(path: Path, name: str) -> Iterator[Row]:
    """Rows of a Parquet file, decoded 1,024 at a time. Raises DataError if the file cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        file = pq.ParquetFile(pa.OSFile(str(path)))
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield f"{name}[{index}]", row
                index += 1
    except (pa.ArrowException, ValueError, OverflowError) as error:  # a text that is not UTF-8, the year 9,999,999
        raise DataError(f"{name}: not a readable Parquet file, behind row {index:,}: {error}") from error


def iter_hub(dataset: Any, name: str) -> Iterator[Row]:
    """Rows of a hub data set."""
    for index in range(len(dataset)):
        try:
            row = dataset[index]
        except Exception as error:  # decoders of images and audio raise errors of many libraries
            raise DataError(f"{name}[{index}]: the row cannot be read: {error}") from error
        yield f"{name}[{index}]", row
