"""The held-out rows, those that a list leaves out, and the limit."""

import numpy as np
import pytest

from sftmix.data.store import open_rows
from sftmix.words.errors import ConfigError, DataError


def rows_of(kind: str, n: int) -> list[dict]:
    return [{"instruction": f"Say {kind} {i}.", "output": f"{kind} {i}", "kind": kind} for i in range(n)]


@pytest.fixture
def files(write) -> tuple[str, str, str]:
    return write("a.jsonl", rows_of("a", 40)), write("b.json", rows_of("b", 30)), write("c.jsonl", rows_of("c", 7))


def ids(side) -> list[str]:
    return side.values("id")


# ------------------------------------------------------------------------------------------- the held-out rows


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 10), (0.001, 1), (0.9, 36)])
def test_held_out_fraction(fraction, count, write, read):
    path = write("rows.jsonl", rows_of("a", 40))
    ids = []
    for seed in (0, 0, 2):
        prepared = read(path, eval_fraction=fraction, run_seed=seed)
        assert len(prepared.eval.records) == count
        assert sorted([*prepared.train.records, *prepared.eval.records]) == list(range(40))
        assert (np.diff(prepared.train.records) > 0).all()
        ids.append(prepared.eval.values("id"))
    assert ids[0] == ids[1] != ids[2]


def test_held_out_files_and_overlap(write, read):
    train = rows_of("a", 5)
    held_out = write("eval.jsonl", [{"instruction": train[3]["instruction"], "output": "a 3"}, train[0]])
    prepared = read(write("train.jsonl", train), eval=[held_out], label_field="kind", limit=3)
    assert (len(prepared.train.records), len(prepared.eval.records)) == (3, 2)
    assert prepared.report.counts == {"eval_in_train": 1}
    assert prepared.report.rows == 4 + 2  # one more than the limit, which says that there are more
    assert prepared.train.values("label") == ["a"] * 3


# ---------------------------------------------------------------------------------------------- the limit


def test_the_held_out_rows_are_those_of_every_limit(files, read):
    full = read(*files, eval_fraction=0.1)
    for limit in (5, 60):
        prepared = read(*files, eval_fraction=0.1, limit=limit)
        assert ids(prepared.eval) == ids(full.eval)
        assert ids(prepared.train) == ids(full.train)[:limit]
        assert f"no more than the first {limit} training rows are used (data.limit)" in prepared.report.notes


def test_rows_that_a_file_names_are_left_out_and_named(files, read, tmp_path):
    whole = read(*files).train
    places = whole.values("source")
    marks = tmp_path / "drop.txt"
    lines = f"{ids(whole)[3]}\r\n\r\n{places[41]}\r\n{ids(whole)[70]}@turn0\r\n"
    marks.write_bytes(lines.encode("utf-8-sig"))  # as editors on Windows save it
    prepared = read(*files, exclude=str(marks))
    assert ids(prepared.train) == [name for k, name in enumerate(ids(whole)) if k not in (3, 41, 70)]
    assert prepared.report.counts["excluded"] == 3
    assert f"{ids(whole)[3]} ({places[3]})" in prepared.report.first["excluded"]
    assert prepared.train.key != whole.key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"nobody\n", "names 1 that are no rows of data.train, such as 'nobody'"),
        ("an-id\n".encode("utf-16-be"), "cannot be read: it is in UTF-16-BE; save it as UTF-8"),
        ("né\n".encode("cp1252"), "cannot be read: .* can't decode byte 0xe9 in position 1: .*; save it as UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_marks_of_no_row_are_refused(text, message, files, read, tmp_path):
    marks = tmp_path / "drop.txt"
    if text is not None:
        marks.write_bytes(text)
    with pytest.raises(ConfigError, match=f"data.exclude: .*{message}"):
        read(*files, exclude=str(marks))


def test_behind_the_limit_nothing_is_read(read, write, tmp_path):
    """Neither kept in the cache nor checked, unless rows are held out or left out before the limit."""
    path = write("rows.jsonl", [*rows_of("a", 9), {"broken": 1}])
    prepared = read(path, limit=3)
    assert prepared.report.rows == 4
    (stored,) = (tmp_path / "cache").glob("rows-*/rows.arrow")
    assert open_rows(stored).num_rows == 4
    whole = read(path, skip_bad=True)
    assert ids(prepared.train) == ids(whole.train)[:3]
    assert "data.limit" not in str(read(path, limit=9, skip_bad=True).report.notes)
    marks = write("marks.txt", "nobody")
    for more in ({"eval_fraction": 0.3}, {"duplicates": "drop"}, {"exclude": marks}):
        with pytest.raises(DataError, match="1 bad row"):
            read(path, limit=3, **more)
