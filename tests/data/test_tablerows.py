"""Tables: two columns of one name are refused, a row that cannot be read is a bad row, a long row fills no memory."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.common.errors import DataError
from sftmix.data.jsonrows import MAX_ROW_BYTES, BadRow
from sftmix.data.rows import prepare
from sftmix.data.sources import Source

TEXTS = pa.array(["a", "b", "c"])
UNREADABLE = {
    "not UTF-8": pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"x\xff\xfey")]
    ),
    "a day of the year 2739877": pa.array([1, 10**9, 2], pa.int32()).cast(pa.date32()),
}


@pytest.fixture(params=UNREADABLE)
def table(request) -> pa.Table:
    """Three rows; the second has a cell that is no value of Python, in a column that no format reads."""
    return pa.table({"instruction": TEXTS, "output": TEXTS, "extra": UNREADABLE[request.param]})


def test_a_cell_that_cannot_be_read_is_a_bad_row(table, tmp_path, options):
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError, match=r"(?s)^1 bad row .*rows\.parquet\[1\]: the row cannot be read: "):
        prepare(options(str(path)), 0, progress=False)
    prepared = prepare(options(str(path), skip_bad=True), 0, progress=False)
    assert [prepared.train.source(r) for r in prepared.train.records.tolist()] == [f"{path}[0]", f"{path}[2]"]


def test_a_row_of_the_hub_that_cannot_be_read_is_a_bad_row(table):
    rows = list(Source("someone/data", "fingerprint", datasets.Dataset(table)).rows())
    assert [place for place, _ in rows] == [f"someone/data[{index}]" for index in range(3)]
    assert [row if isinstance(row, BadRow) else row["output"] for _, row in rows] == ["a", rows[1][1], "c"]
    assert isinstance(rows[1][1], BadRow)
    assert "the row cannot be read: " in str(rows[1][1])


def test_two_columns_of_one_name_are_refused(write, options, tmp_path):
    text = write("rows.csv", "instruction,output,output\na,b,c\n")
    pq.write_table(pa.table([TEXTS] * 3, names=["instruction", "output", "output"]), tmp_path / "rows.parquet")
    for path, place in ((text, f"{text}:1"), (str(tmp_path / "rows.parquet"), f"{tmp_path / 'rows.parquet'}")):
        with pytest.raises(DataError) as caught:
            prepare(options(path), 0, progress=False)
        assert str(caught.value).startswith(f"{place}: several columns have the name 'output'; rename")


LONG = {"a line": b"a" * (MAX_ROW_BYTES + 1), "lines": b'"' + (b"a" * 999_999 + b"\n") * 17 + b'"'}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_row_of_csv_is_a_bad_row(kind, tmp_path):
    """A cell may hold several lines, and the row is no longer than one of JSON."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b"instruction,output\na,b\n" + LONG[kind] + b"\nc,d\n")
    good, bad, *others = Source(str(path), "digest").rows()
    assert good == (f"{path}:2", {"instruction": "a", "output": "b"})
    assert (bad[0], str(bad[1])) == (f"{path}:3", "not valid CSV: a row of more than 16,777,216 characters")
    if kind == "a line":  # behind lines that are not read as one row, nobody knows where the next one begins
        assert others == [(f"{path}:4", {"instruction": "c", "output": "d"})]


def test_a_file_of_one_line_is_not_read_as_a_whole(tmp_path):
    import tracemalloc

    path = tmp_path / "rows.csv"
    with open(path, "wb") as file:
        file.write(b"instruction,output\n")
        file.truncate(200_000_000)
    tracemalloc.start()
    ((place, problem),) = Source(str(path), "digest").rows()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (place, type(problem)) == (f"{path}:2", BadRow)
    assert peak < 100_000_000
