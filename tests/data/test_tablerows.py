"""Tables: two columns of one name are refused, a row that cannot be read is a bad row, a long line fills no memory."""

from __future__ import annotations

import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.data.jsonrows import MAX_ROW_BYTES, BadRow
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


def test_a_cell_that_cannot_be_read_is_a_bad_row(table, tmp_path, read, refused):
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    assert refused(str(path))[1].startswith(f"{path}[1]: the row cannot be read: ")
    assert read(str(path), skip_bad=True).train.values("source") == [f"{path}[0]", f"{path}[2]"]


def test_a_row_of_the_hub_that_cannot_be_read_is_a_bad_row(table):
    rows = list(Source("someone/data", "fingerprint", datasets.Dataset(table)).rows())
    assert [place for place, _ in rows] == [f"someone/data[{index}]" for index in range(3)]
    assert [row if isinstance(row, BadRow) else row["output"] for _, row in rows] == ["a", rows[1][1], "c"]
    assert isinstance(rows[1][1], BadRow)
    assert "the row cannot be read: " in str(rows[1][1])


def test_two_columns_of_one_name_are_refused(write, refused, tmp_path):
    text = write("rows.csv", "instruction,output,output\na,b,c\n")
    pq.write_table(pa.table([TEXTS] * 3, names=["instruction", "output", "output"]), tmp_path / "rows.parquet")
    for path, place in ((text, f"{text}:1"), (str(tmp_path / "rows.parquet"), f"{tmp_path / 'rows.parquet'}")):
        assert refused(path)[0].startswith(f"{place}: several columns have the name 'output'; rename")


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (b"a" * (MAX_ROW_BYTES + 1), "a line of more than 16,777,216"),
        (b'"' + (b"a" * 999_999 + b"\n") * 17 + b'"', "field larger than field limit"),
    ],
    ids=["line", "cell"],
)
def test_a_long_row_of_csv_is_refused(cell, reason, write, refused):
    path = write("rows.csv", b"instruction,output\na,b\n" + cell + b"\nc,d\n")
    (line,) = [line for line in refused(path) if line.startswith(f"{path}:3: ")]
    assert reason in line


def test_a_file_of_one_line_is_not_read_as_a_whole(tmp_path, refused):
    path = tmp_path / "rows.csv"
    with open(path, "wb") as file:
        file.write(b"instruction,output\n")
        file.truncate(200_000_000)
    tracemalloc.start()
    (line,) = refused(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert line.startswith(f"{path}:2: a line of more")
    assert peak < 100_000_000


def test_csv_rows(write, refused):
    path = write("rows.csv", b'instruction,input,output,score\n"Say\nhi",,Hi,3\nA,B\n"q,",x,\xff,1\nq,x,y,\xff\n"open')
    lines = refused(path)[1:]
    assert lines[0] == f"{path}:4: 2 fields, but the header has 4"
    assert lines[1].startswith(f"{path}:5: output contains a lone surrogate or bytes that are not UTF-8")
    assert lines[2].startswith(f"{path}:6: field 'score' contains a lone surrogate or bytes that are not UTF-8")
    assert lines[3].startswith(f"{path}:7: not valid CSV")
