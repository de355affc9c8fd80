"""Tables: what cannot be read is told by its place."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.common.errors import DataError
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


def test_a_cell_that_cannot_be_read_ends_the_reading_by_name(table, tmp_path, refused):
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    (line,) = refused(str(path))
    assert line.startswith(f"{path}: not a readable Parquet file, behind row 0: ")
    rows = Source("someone/data", "fingerprint", datasets.Dataset(table)).rows()
    assert next(rows)[1]["output"] == "a"
    with pytest.raises(DataError, match=r"^someone/data\[1\]: the row cannot be read: "):
        next(rows)


def test_a_long_cell_of_csv_is_a_bad_row(write, refused):
    cell = b'"' + (b"a" * 999_999 + b"\n") * 17 + b'"'
    path = write("rows.csv", b"instruction,output\na,b\n" + cell + b"\nc,d\n")
    (line,) = [line for line in refused(path) if line.startswith(f"{path}:3: ")]
    assert "field larger than field limit" in line


def test_csv_rows(write, refused):
    path = write("rows.csv", b'instruction,input,output,score\n"Say\nhi",,Hi,3\nA,B\n"q,",x,\xff,1\nq,x,y,\xff\n"open')
    lines = refused(path)[1:]
    assert lines[0] == f"{path}:4: 2 fields, but the header has 4"
    assert lines[1].startswith(f"{path}:5: output contains a lone surrogate or bytes that are not UTF-8")
    assert lines[2].startswith(f"{path}:6: field 'score' contains a lone surrogate or bytes that are not UTF-8")
    assert lines[3].startswith(f"{path}:7: not valid CSV")
