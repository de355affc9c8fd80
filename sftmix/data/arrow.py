"""Arrow files of fixed-size record batches, written row by row and read through a memory map."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sftmix.types import Int64

BATCH_ROWS = 1024


class RowWriter:
    """Streams rows into an Arrow IPC file; every record batch but the last holds BATCH_ROWS rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, by column; a column that it lacks is null."""
        self._rows.append(row)
        if len(self._rows) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                self._writer.close()
        finally:
            self._sink.close()


class RowFile:
    """Random access to such a file; nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
        self.schema = reader.schema
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]

    def __len__(self) -> int:
        return BATCH_ROWS * (len(self._batches) - 1) + self._batches[-1].num_rows if self._batches else 0

    def cell(self, row: int, column: str) -> pa.Scalar:
        """One value; `row` counts from 0 and must be in range."""
        batch, index = divmod(row, BATCH_ROWS)
        return self._batches[batch].column(column)[index]

    def rows(self, rows: Int64) -> Iterator[dict[str, Any]]:
        """Whole rows in the given order; neighbours in one record batch are read together."""
        batch = rows // BATCH_ROWS
        cuts = np.flatnonzero(np.diff(batch)) + 1
        for part in np.split(rows, cuts) if len(rows) else ():
            yield from self._batches[part[0] // BATCH_ROWS].take(pa.array(part % BATCH_ROWS)).to_pylist()

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column, still on disk."""
        field = self.schema.field(name)
        return pa.chunked_array([b.column(name) for b in self._batches], type=field.type)
