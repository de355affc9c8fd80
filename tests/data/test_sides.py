"""Some rows of each source (data.take), and the order in which rows are taken, held out and limited."""

from __future__ import annotations

import numpy as np
import pytest

from sftmix.common.errors import ConfigError
from sftmix.common.rng import stable_hash
from sftmix.data import encode
from sftmix.data.encoders import text_encoder
from sftmix.data.rows import prepare
from tests.tiny import Tiny, make_tiny

SEED = 3


def rows_of(kind: str, n: int) -> list[dict]:
    return [{"instruction": f"Say {kind} {i}.", "output": f"{kind} {i}", "kind": kind} for i in range(n)]


@pytest.fixture
def files(write) -> tuple[str, str, str]:
    return write("a.jsonl", rows_of("a", 40)), write("b.json", rows_of("b", 30)), write("c.jsonl", rows_of("c", 7))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def ids(side) -> list[str]:
    return [side.id(record) for record in side.records.tolist()]


def kinds(side) -> list[str]:
    return [side.columns(record)["kind"] for record in side.records.tolist()]


def by_hash(found: list[str], count: int, seed: int = SEED) -> list[str]:
    """Take the ids with the smallest hashes; in the order of `found`."""
    smallest = sorted(found, key=lambda name: stable_hash(seed, "take", name) % 2**64)[:count]
    return [name for name in found if name in smallest]


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [([10, 0.5, None], (10, 15, 7)), ([0.99, 30, 1], (40, 30, 1)), ([None, None, 0.5], (40, 30, 4))],
)
def test_numbers_and_shares_of_each_entry(sizes, counts, files, options):
    whole = prepare(options(*files), SEED, progress=False).train
    prepared = prepare(options(*files, take=sizes), SEED, progress=False)
    starts = {"a": (0, 40), "b": (40, 70), "c": (70, 77)}
    parts = [by_hash(ids(whole)[slice(*starts[kind])], n) for kind, n in zip("abc", counts, strict=True)]
    assert ids(prepared.train) == [name for part in parts for name in part]  # in the order of the files
    assert kinds(prepared.train) == [kind for kind, n in zip("abc", counts, strict=True) for _ in range(n)]
    note = ", ".join(f"{n} of {rows} from {f}" for n, rows, f in zip(counts, (40, 30, 7), files, strict=True))
    assert prepared.report.lines()[0] == f"rows taken (data.take): {note}"
    assert (prepared.train.fingerprint == whole.fingerprint) == (counts == (40, 30, 7))


def test_the_choice_does_not_depend_on_the_order_and_grows_with_the_number(write, options):
    rows = rows_of("a", 40)
    for_seed = {}
    for name, found in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        given = options(write(name, found), take=12)
        for_seed[name] = set(ids(prepare(given, SEED, progress=False).train))
    assert for_seed["a.jsonl"] == for_seed["b.jsonl"]
    path = write("a.jsonl", rows)
    more = set(ids(prepare(options(path, take=20), SEED, progress=False).train))
    assert for_seed["a.jsonl"] < more
    other = set(ids(prepare(options(path, take=12), SEED + 1, progress=False).train))
    assert other != for_seed["a.jsonl"]
    same = set(ids(prepare(options(path, take=12, seed=SEED), SEED + 1, progress=False).train))
    assert same == for_seed["a.jsonl"]


def test_a_directory_is_one_entry_and_bad_rows_are_none(write, options, tmp_path):
    """A row whose own id is taken is written and left out: the entries behind it do not move."""
    (tmp_path / "many").mkdir()
    write("many/a.jsonl", [{"id": "x", **row} if i < 2 else row for i, row in enumerate(rows_of("a", 6))])
    write("many/b.jsonl", [*rows_of("b", 3), {"instruction": "u"}])
    path = write("c.jsonl", rows_of("c", 5))
    given = options(str(tmp_path / "many"), path, take=[8, 2], skip_bad=True)
    prepared = prepare(given, SEED, progress=False)
    assert kinds(prepared.train) == ["a"] * 5 + ["b"] * 3 + ["c"] * 2
    assert f"8 of 8 from {tmp_path / 'many'}, 2 of 5 from {path}" in prepared.report.lines()[0]


def test_rows_of_files_and_of_their_directory_are_kept_apart_in_the_cache(write, options, tmp_path):
    (tmp_path / "both").mkdir()
    paths = [write(f"both/{kind}.jsonl", rows_of(kind, 10)) for kind in "ab"]
    apart = prepare(options(*paths, take=[3, 4]), SEED, progress=False).train
    assert kinds(apart) == ["a"] * 3 + ["b"] * 4
    together = prepare(options(str(tmp_path / "both"), take=12), SEED, progress=False)
    assert len(ids(together.train)) == 12
    assert f"12 of 20 from {tmp_path / 'both'}" in together.report.lines()[0]


def test_documents_are_taken_whole(write, options):
    path = write("tales.jsonl", [{"text": f"Tale {i}."} for i in range(10)])
    novel = write("novel.txt", "A novel.")
    prepared = prepare(options(path, novel, take=[0.3, None]), SEED, progress=False)
    assert [len(prepared.train.records), "".join(prepared.train.text(10))] == [4, "A novel."]
    with pytest.raises(ConfigError, match=r"data\.take 0\.4 of .*novel\.txt is 0 of 1 usable rows; .* 1 to 1, or null"):
        prepare(options(path, novel, take=[0.3, 0.4]), SEED, progress=False)


def test_rows_are_held_out_of_those_that_are_taken(files, options):
    taken = prepare(options(*files, take=[20, 10, 2]), SEED, progress=False).train
    prepared = prepare(options(*files, take=[20, 10, 2], eval_fraction=0.25), SEED, progress=False)
    assert len(prepared.eval.records) == 8
    assert sorted(ids(prepared.train) + ids(prepared.eval)) == sorted(ids(taken))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1, 2], r"data\.take names 2 numbers \(1, 2\) for 3 entries of data\.train \(.*\); give one for each"),
        (5, r"names 1 numbers \(5\) for 3 entries"),
        ([1, 1.5, None], r"data\.take has 1\.5; .*a share below 1\.0, or null\. No row is used twice"),
        ([1, 1.0, None], r"data\.take has 1\.0"),
        ([0, None, None], r"data\.take has 0;"),
        ([True, None, None], r"data\.take has True"),
        (["7", None, None], r"data\.take has 7;"),
        ([None, 31, None], r"data\.take 31 of .*b\.json is 31 of 30 usable rows; name a number from 1 to 30, or null"),
    ],
)
def test_sizes_that_cannot_be(sizes, message, files, options):
    with pytest.raises(ConfigError, match=message):
        prepare(options(*files, take=sizes), SEED, progress=False)


def test_values_of_the_command_line(tiny, files, sftmix):
    words = ["preview", "--model.path", str(tiny.model), "--data.train", f"[{files[0]}, {files[1]}]"]
    for given, counts in (
        (["--data.take", "[null, 3]"], "40 of 40 from {0}, 3 of 30"),
        (["--data.take", "7", "--data.take+", "0.1"], "7 of 40 from {0}, 3 of 30"),
    ):
        shown = sftmix(*words, *given)
        assert shown.code == 0, shown.err
        assert f"rows taken (data.take): {counts.format(files[0])}" in shown.out
    assert sftmix(*words, "--data.take", "[1.0, 2]").code == 2


# ------------------------------------------------------------------------------------------- the held-out rows


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 10), (0.1, 4), (0.001, 1), (0.9, 36)])
def test_held_out_fraction(fraction, count, write, options):
    path = write("rows.jsonl", rows_of("a", 40))
    ids = []
    for seed in (0, 0, 2):
        prepared = prepare(options(path, eval_fraction=fraction), seed, progress=False)
        assert len(prepared.eval.records) == count
        both = np.sort(np.r_[prepared.train.records, prepared.eval.records])
        assert both.tolist() == list(range(40))
        assert (np.diff(prepared.train.records) > 0).all()
        ids.append([prepared.eval.id(r) for r in prepared.eval.records.tolist()])
    assert ids[0] == ids[1] != ids[2]


def test_held_out_rows_do_not_depend_on_the_order_of_the_file(write, options):
    rows = rows_of("a", 40)
    sides = []
    for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        prepared = prepare(options(write(name, order), eval_fraction=0.3), 3, progress=False)
        sides.append({prepared.eval.id(r) for r in prepared.eval.records.tolist()})
    assert sides[0] == sides[1]


def test_held_out_files_and_overlap(write, options):
    train = [{"instruction": f"Say {i}.", "output": str(i), "q": "high"} for i in range(5)]
    path, held_out = (
        write("train.jsonl", train),
        write("eval.jsonl", [{"instruction": "Say 3.", "output": "3"}, train[0]]),
    )
    prepared = prepare(options(path, eval=[held_out], label_field="q", limit=3), 0, progress=False)
    assert (len(prepared.train.records), len(prepared.eval.records)) == (3, 2)
    assert prepared.report.counts == {"eval_in_train": 1}
    assert prepared.report.rows == 7
    assert prepared.train.label(0) == "high"


# ---------------------------------------------------------------------------------------------- the limit


NOTE = "{} training rows left out (data.limit)"
WHY = "the held-out rows were chosen before that, so that they are the same for every limit"


def test_the_held_out_rows_are_those_of_every_limit_and_the_report_says_so(files, options):
    full = prepare(options(*files, eval_fraction=0.1), SEED, progress=False)
    for limit in (5, 60):
        prepared = prepare(options(*files, eval_fraction=0.1, limit=limit), SEED, progress=False)
        assert ids(prepared.eval) == ids(full.eval)
        assert ids(prepared.train) == ids(full.train)[:limit]
        assert any(line.startswith(f"{NOTE.format(69 - limit)}; {WHY}") for line in prepared.report.lines())


def test_nothing_is_said_of_held_out_rows_from_files_of_their_own(files, options):
    for more in ({}, {"eval": [files[2]]}):
        prepared = prepare(options(*files[:2], limit=5, **more), SEED, progress=False)
        assert NOTE.format(65) in prepared.report.lines()


def test_of_text_too(write, options, small):
    path = write("tales.jsonl", [{"text": f"Tale {i}, with some words in it."} for i in range(40)])
    for more, why in (({"eval_fraction": 0.1}, True), ({}, False)):
        prepared = prepare(options(path, limit=3, **more), SEED, progress=False)
        data = encode(prepared, text_encoder(small["bos"]), max_length=16, progress=False)
        (note,) = [line for line in data.report.lines() if "(data.limit)" in line]
        assert note.startswith("the first 3 training windows are used, the rest left out")
        assert (WHY in note) == why


MANY = "rows are held out beside"


@pytest.mark.parametrize(("limit", "fraction"), [(5, 0.1), (5, 0.2), (5, 0.75)])
def test_more_held_out_than_trained_on_by_a_limit_is_remarked(limit, fraction, files, options):
    prepared = prepare(options(files[0], eval_fraction=fraction, limit=limit), SEED, progress=False)
    held_out = round(40 * fraction)
    lines = [line for line in prepared.report.lines() if line.startswith(f"{held_out} {MANY} {limit} to train on")]
    assert len(lines) == (held_out > limit)


def test_a_share_that_holds_out_most_rows_by_itself_is_not_remarked(files, options):
    """What is asked for, without a limit or with one that leaves nothing out."""
    for limit in (None, 20):
        report = prepare(options(files[0], eval_fraction=0.6, limit=limit), SEED, progress=False).report
        assert not any(MANY in line for line in report.lines())


def test_more_held_out_windows_than_training_windows_are_told(write, options, small):
    path = write("tales.jsonl", [{"text": f"Tale {i}, with some words in it."} for i in range(40)])
    for limit, told in ((2, True), (None, False)):
        prepared = prepare(options(path, limit=limit, eval_fraction=0.5), SEED, progress=False)
        data = encode(prepared, text_encoder(small["bos"]), max_length=16, progress=False)
        lines = [line for line in data.report.lines() if "windows are held out beside" in line]
        assert len(lines) == told
        if told:
            assert lines[0].startswith(f"{len(data.eval)} windows are held out beside 2 to train on")
