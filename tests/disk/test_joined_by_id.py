"""The tables of a run are joined with its rows by id, in whatever order they are, and refused if the ids differ."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.disk.tables import read_split
from sftmix.tools.report.run import read_run
from sftmix.words.errors import DataError
from tests.tiny import metrics
from tests.tools.verify.runs import Copy

FILES = ("split/split.parquet", "confidence/confidence.parquet", "reference/../confidence/dynamics.parquet")


@pytest.fixture
def copied(finished, tmp_path) -> Copy:
    return Copy(finished.tiny, shutil.copytree(finished.path, tmp_path / "run"))


def rewritten(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """Write a table anew, with the metadata that it had."""

    def write(file: Path) -> None:
        table = pq.read_table(file)
        pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), file)

    return write


def with_ids(of: Callable[[str], str | None]) -> Callable[[pa.Table], pa.Table]:
    """Give the lines other ids; None takes a line away."""

    def change(table: pa.Table) -> pa.Table:
        names = [of(name) for name in table["id"].to_pylist()]
        return table.set_column(0, "id", pa.array(names)).filter(pa.array([name is not None for name in names]))

    return change


def reversed_lines(table: pa.Table) -> pa.Table:
    return table.take(list(range(len(table)))[::-1])


@pytest.mark.parametrize("name", FILES)
def test_a_table_in_another_order_is_of_the_same_rows(copied, finished, name):
    copied.edit(name, rewritten(reversed_lines))
    ours, theirs = read_run(copied.run), read_run(finished.path)
    assert ours.split.labels == theirs.split.labels
    np.testing.assert_array_equal(ours.scores.confidence, theirs.scores.confidence)
    np.testing.assert_array_equal(ours.scores.variability, theirs.scores.variability)
    np.testing.assert_array_equal(ours.dynamics.nll_sum, theirs.dynamics.nll_sum)


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("case", ["others", "fewer", "one more"])
def test_a_table_of_other_ids_is_refused(copied, name, case):
    first = pd.read_parquet(copied.run / name).id[0]
    changes = {
        "others": with_ids(lambda one: f"{one}x"),
        "fewer": with_ids(lambda one: None if one == first else one),
        "one more": lambda table: pa.concat_tables([table, with_ids(lambda one: "x" if one == first else None)(table)]),
    }
    copied.edit(name, rewritten(changes[case]))
    with pytest.raises(DataError, match=rf"{Path(name).name}: it is of other examples than the 29 rows"):
        read_run(copied.run)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES[:2])
def test_a_run_that_goes_on_takes_each_row_with_its_own_group(copied, finished, sftmix, name):
    copied.edit(name, rewritten(reversed_lines))
    for stage in ("train", "baseline", "base"):
        shutil.rmtree(copied.run / stage)
    if name == FILES[1]:
        shutil.rmtree(copied.run / "split")
    done = sftmix(*finished.words, "--out", str(copied.run))
    assert done.code == 0, done.err
    ours, theirs = ([(line["rows"], line["loss"]) for line in metrics(run)] for run in (copied.run, finished.path))
    assert ours == theirs


@pytest.mark.parametrize("ids", [[["a"], ["b"]], [b"\xff", b"b"]], ids=["lists", "bytes"])
def test_a_column_of_ids_that_are_no_texts_is_named(tmp_path, ids):
    pq.write_table(pa.table({"id": ids, "group": ["confident", "unconfident"]}), tmp_path / "groups.parquet")
    with pytest.raises(DataError, match=r"groups\.parquet: column id does not hold string: "):
        read_split(tmp_path / "groups.parquet", of=["a", "b"])
