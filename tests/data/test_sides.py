"""Some rows of each source (data.take), and the order in which rows are taken, held out and limited."""

import json
from itertools import chain

import numpy as np
import pytest

from sftmix.common.errors import ConfigError
from sftmix.common.rng import stable_hash

SEED = 0


def rows_of(kind: str, n: int) -> list[dict]:
    return [{"instruction": f"Say {kind} {i}.", "output": f"{kind} {i}", "kind": kind} for i in range(n)]


@pytest.fixture
def files(write) -> tuple[str, str, str]:
    return write("a.jsonl", rows_of("a", 40)), write("b.json", rows_of("b", 30)), write("c.jsonl", rows_of("c", 7))


def ids(side) -> list[str]:
    return side.values("id")


def kinds(side) -> list[str]:
    return [json.loads(columns)["kind"] for columns in side.values("columns")]


def by_hash(found: list[str], count: int, seed: int = SEED) -> list[str]:
    """Take the ids with the smallest hashes; in the order of `found`."""
    smallest = sorted(found, key=lambda name: stable_hash(seed, "take", name) % 2**64)[:count]
    return [name for name in found if name in smallest]


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [([10, 0.5, None], (10, 15, 7)), ([0.99, 30, 1], (40, 30, 1)), ([None, None, 0.5], (40, 30, 4))],
)
def test_numbers_and_shares_of_each_entry(sizes, counts, files, read):
    whole = read(*files).train
    prepared = read(*files, take=sizes)
    entries = np.split(np.array(ids(whole)), [40, 70])
    parts = [by_hash(entry.tolist(), n) for entry, n in zip(entries, counts, strict=True)]
    assert ids(prepared.train) == list(chain(*parts))  # in the order of the files
    note = ", ".join(f"{n} of {rows} from {f}" for n, rows, f in zip(counts, (40, 30, 7), files, strict=True))
    assert f"rows taken (data.take): {note}" in prepared.report.lines()
    assert (prepared.train.fingerprint == whole.fingerprint) == (counts == (40, 30, 7))


def test_the_seed_of_the_choice(write, read):
    """data.seed, or else that of the run."""
    path = write("a.jsonl", rows_of("a", 40))
    whole = ids(read(path).train)
    for run_seed, seed in ((0, None), (1, None), (1, 0)):
        chosen = by_hash(whole, 12, run_seed if seed is None else seed)
        assert ids(read(path, take=12, run_seed=run_seed, seed=seed).train) == chosen


def test_a_directory_is_one_entry_and_bad_rows_are_none(write, read, tmp_path):
    """A row whose own id is taken is none of its entry."""
    many = tmp_path / "many"
    many.mkdir()
    a = write("many/a.jsonl", [{"id": "x", **row} if i < 2 else row for i, row in enumerate(rows_of("a", 6))])
    b = write("many/b.jsonl", [*rows_of("b", 3), {"instruction": "u"}])
    c = write("c.jsonl", rows_of("c", 5))
    assert kinds(read(a, b, take=[2, 1], skip_bad=True).train) == ["a"] * 2 + ["b"]  # of the same files, in the cache
    prepared = read(str(many), c, take=[8, 2], skip_bad=True)
    assert kinds(prepared.train) == ["a"] * 5 + ["b"] * 3 + ["c"] * 2
    assert f"8 of 8 from {many}, 2 of 5 from {c}" in "".join(prepared.report.notes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1, 2], r"data\.take has 2 values \[1, 2\] for 3 entries of data\.train \[.*\]; give one for each"),
        ([0, 1.5, None], r"data\.take has 0; .*(.|\n)*data\.take has 1\.5"),
        ([None, 31, None], r"data\.take 31 of .*b\.json is 31 of 30 usable rows; name a number from 1 to 30, or null"),
    ],
)
def test_sizes_that_cannot_be(sizes, message, files, read):
    with pytest.raises(ConfigError, match=message):
        read(*files, take=sizes)


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
    assert prepared.report.rows == 7
    assert prepared.train.values("label") == ["a"] * 3


# ---------------------------------------------------------------------------------------------- the limit


def test_the_held_out_rows_are_those_of_every_limit(files, read):
    full = read(*files, eval_fraction=0.1)
    for limit in (5, 60):
        prepared = read(*files, eval_fraction=0.1, limit=limit)
        assert ids(prepared.eval) == ids(full.eval)
        assert ids(prepared.train) == ids(full.train)[:limit]
        assert f"{69 - limit} training rows left out (data.limit)" in prepared.report.notes


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
    assert prepared.train.fingerprint != whole.fingerprint


def test_rows_that_were_not_taken_may_be_named(files, read, tmp_path):
    """The same list serves whatever is taken: what is left is what was taken, without the named rows."""
    whole, taken = ids(read(*files).train), ids(read(*files, take=[10, 12, None]).train)
    marks = tmp_path / "drop.txt"
    marks.write_text("\n".join(whole[::2]))
    left = read(*files, take=[10, 12, None], exclude=str(marks)).train
    assert ids(left) == [name for name in taken if name not in whole[::2]]
    assert 0 < len(ids(left)) < len(taken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"nobody\n", "names 1 that are no rows of data.train, such as 'nobody'"),
        ("an-id\n".encode("utf-16-be"), "cannot be read: it is in UTF-16-BE; save it as UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_marks_of_no_row_are_refused(text, message, files, read, tmp_path):
    marks = tmp_path / "drop.txt"
    if text is not None:
        marks.write_bytes(text)
    with pytest.raises(ConfigError, match=f"data.exclude: .*{message}"):
        read(*files, exclude=str(marks))
