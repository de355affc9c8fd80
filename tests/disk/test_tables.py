"""Parquet artefacts: what is written is what is read, other readers see plain tables, bad files are refused."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftmix.disk import tables
from sftmix.types import RowLosses, Split, TrainingDynamics
from sftmix.words.errors import DataError


@st.composite
def dynamics(draw):
    n, c = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_tokens = rng.integers(0, 4, size=n)
    token_nll = [rng.random((c, k)).astype("f2").astype("f4") for k in n_tokens]  # float16 in the file
    return TrainingDynamics(
        ids=draw(st.lists(st.text(max_size=5), min_size=n, max_size=n, unique=True)),
        steps=np.sort(rng.choice(100, size=c, replace=False)),
        nll_sum=np.asarray([nll.sum(axis=1, dtype=np.float64) for nll in token_nll]).reshape(n, c),
        n_tokens=n_tokens,
        n_correct=rng.integers(0, n_tokens[:, None] + 1, size=(n, c)),
        token_nll=token_nll if draw(st.booleans()) else None,
        token_margin=token_nll if draw(st.booleans()) else None,
        states=rng.normal(size=(n, 3)).astype(np.float16) if draw(st.booleans()) else None,
    )


def same(a: TrainingDynamics, b: TrainingDynamics) -> None:
    np.testing.assert_equal(asdict(a), asdict(b))
    for name in ("steps", "nll_sum", "n_tokens", "n_correct"):
        assert getattr(a, name).dtype == getattr(b, name).dtype
    assert {nll.dtype for one in (a, b) for nll in one.token_nll or ()} <= {np.dtype(np.float32)}


@given(dynamics(), st.randoms(use_true_random=False))
def test_dynamics_survive_the_file_in_any_order_of_lines(tmp_path_factory, given_, random):
    path = tmp_path_factory.mktemp("tables") / "dynamics.parquet"
    tables.write_dynamics(path, given_)
    same(tables.read_dynamics(path), given_)

    table = pq.read_table(path)
    lines = list(range(len(table)))
    random.shuffle(lines)
    pq.write_table(table.take(lines), path)
    shuffled = tables.read_dynamics(path)
    same(shuffled.of(given_.ids), given_)


SMALL = TrainingDynamics(
    ids=["a", "b"],
    steps=np.asarray([3, 6]),
    nll_sum=np.asarray([[1.5, 0.5], [np.nan, np.nan]]),
    n_tokens=np.asarray([2, 0]),
    n_correct=np.asarray([[0, 2], [0, 0]]),
)


def test_the_dynamics_table_is_as_documented(tmp_path):
    tables.write_dynamics(tmp_path / "d.parquet", SMALL)
    assert pq.read_table(tmp_path / "d.parquet").to_pylist() == [
        {"id": "a", "checkpoint": 0, "step": 3, "nll_sum": 1.5, "n_tokens": 2, "n_correct": 0},
        {"id": "a", "checkpoint": 1, "step": 6, "nll_sum": 0.5, "n_tokens": 2, "n_correct": 2},
        {"id": "b", "checkpoint": 0, "step": 3, "nll_sum": 0.0, "n_tokens": 0, "n_correct": 0},
        {"id": "b", "checkpoint": 1, "step": 6, "nll_sum": 0.0, "n_tokens": 0, "n_correct": 0},
    ]


def edited(tmp_path, **columns):
    """The small file with some columns replaced (None: left out)."""
    path = tmp_path / "d.parquet"
    tables.write_dynamics(path, SMALL)
    table = pq.read_table(path).to_pydict() | columns
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), path)
    return path


NOT_WHOLE = "holds no example, or not one line for each example and checkpoint 0, 1, 2"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"checkpoint": [0, 0, 0, 1]}, NOT_WHOLE),
        ({"id": ["a", "a", "b", "c"]}, NOT_WHOLE),
        ({"id": ["a", "b", "b", "b"], "checkpoint": [0, -1, 0, 1]}, NOT_WHOLE),
        ({"checkpoint": [0, 10**9, 0, 1]}, NOT_WHOLE),
        ({"step": [3, 6, 3, 7]}, "step of example 'b'"),
        ({"nll_sum": [float("nan"), 0.5, 0.0, 0.0]}, "nll_sum of example 'a' .* finite numbers from 0"),
        ({"nll_sum": [-1.0, 0.5, 0.0, 0.0]}, "nll_sum of example 'a' .* finite numbers from 0"),
        ({"alone_nll_sum": [0.5, float("inf"), 0.0, 0.0]}, "alone_nll_sum of example 'a' .* finite numbers"),
        ({"n_tokens": [2, 3, 0, 0]}, "one number for all checkpoints"),
        ({"n_tokens": [2, 2, -1, -1]}, r"n_tokens of example 'b' .* 0 \(not scored\) and above"),
        ({"n_correct": [0, 3, 0, 0]}, "n_correct of example 'a' .* 0 to n_tokens"),
        ({"n_tokens": [2.5, 2.5, 0, 0]}, "does not hold int64"),
        ({"nll_sum": [None, 0.5, 0.0, 0.0]}, "column nll_sum has empty cells"),
        ({"n_correct": None}, r"columns \['n_correct'\] are missing"),
        ({"token_nll": [[1.0], [0.5], [], []]}, "token_nll of example 'a'"),
        ({k: [] for k in ("checkpoint", "step", "nll_sum", "n_tokens", "n_correct")} | {"id": pa.array([], "string")},
         NOT_WHOLE),
    ],
)  # fmt: skip
def test_malformed_dynamics_are_refused(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        tables.read_dynamics(edited(tmp_path, **columns))


def test_a_missing_or_foreign_file_is_a_data_error_with_its_path(tmp_path):
    (tmp_path / "text.parquet").write_text("not parquet")
    for name in ("text.parquet", "absent.parquet"):
        with pytest.raises(DataError, match=name):
            tables.read_dynamics(tmp_path / name)


def test_numbers_of_examples_survive_the_file(tmp_path):
    confidence, path = np.asarray([-1.25, np.nan, -np.inf]), tmp_path / "c.parquet"
    tables.write_table(path, ["a", "b", "c"], confidence=confidence)
    assert pq.read_schema(path).names == ["id", "confidence"]
    table = tables.read_columns(path, "id", "confidence")
    assert table["id"] == ["a", "b", "c"]
    np.testing.assert_array_equal(table["confidence"], confidence)


def test_a_split_is_stored_by_the_names_of_its_groups(tmp_path):
    path = tmp_path / "s.parquet"
    split = Split(group=np.asarray([1, -1, 0, 2], dtype=np.int8), names=("z", "a", "m"))
    tables.write_split(path, ["p", "q", "r", "s"], split)
    assert pq.read_table(path).to_pydict() == {"id": ["p", "q", "r", "s"], "group": ["a", "unpaired", "z", "m"]}
    ids, back = tables.read_split(path)
    assert ids == ["p", "q", "r", "s"]
    assert back.names == split.names
    assert back.group.dtype == np.int8
    np.testing.assert_array_equal(back.group, split.group)


def test_a_split_made_by_other_programs_uses_the_papers_names(tmp_path):
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"id": ["a", "b", "c"], "group": ["unconfident", "unpaired", "confident"]}), path)
    _, split = tables.read_split(path)
    assert split.names == ("confident", "unconfident")
    assert split.group.tolist() == [1, -1, 0]
    pq.write_table(pa.table({"id": ["a"], "group": ["sure"]}), path)
    with pytest.raises(DataError, match="'sure'"):
        tables.read_split(path)
    pq.write_table(pa.table({"id": ["a", "a"], "group": ["confident", "confident"]}), path)
    with pytest.raises(DataError, match="there twice"):
        tables.read_split(path)


def test_the_table_of_held_out_examples_comes_back(tmp_path):
    scores = RowLosses(np.array([1.5, 0.25]), np.array([3, 1]), np.array([2, 0]))
    for brier_sum in (np.array([0.5, 0.75]), None):
        tables.write_eval(tmp_path / "eval.parquet", ["b", "a"], scores, brier_sum)
        names = ("id", "nll_sum", "n_tokens", "n_correct")
        back = tables.read_columns(tmp_path / "eval.parquet", *names, optional=["brier_sum"])
        given = [["b", "a"], scores.nll_sum, scores.n_tokens, scores.n_correct, brier_sum]
        np.testing.assert_equal([back[name] for name in (*names, "brier_sum")], given)


def test_scores_in_csv_are_utf_8_with_or_without_a_byte_order_mark(tmp_path):
    path, text = tmp_path / "scores.csv", "id,score\n007,1\n"
    path.write_text("id,score\na,1\nb,\n")
    with pytest.raises(DataError, match=r"scores.csv: column score has empty cells; correct the file$"):
        tables.read_columns(path, "id", "score")
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        assert tables.read_table(path, ["id", "score"]).to_pylist() == [{"id": "007", "score": 1}]
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match=r"scores.csv: cannot be read as CSV: it is in UTF-16; save it as UTF-8"):
        tables.read_table(path, ["id"])


@pytest.mark.parametrize("stored", [b"{", b"1", b"[null]", b"[[1]]", b"\xff", b"[" * 100_000])
def test_names_of_groups_that_are_none_end_in_one_line(stored, tmp_path):
    path = tmp_path / "s.parquet"
    table = pa.table({"id": ["a"], "group": ["easy"]})
    pq.write_table(table.replace_schema_metadata({b"sftmix.groups": stored}), path)
    with pytest.raises(DataError, match="the names of its groups are no list of texts"):
        tables.read_split(path)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_column_that_is_there_twice_is_refused(name, tmp_path):
    path = tmp_path / name
    path.write_text("id,score,score\na,1,2\n")
    if name == "t.parquet":
        columns = [pa.array(["a"]), pa.array([1.0]), pa.array([2.0])]
        pq.write_table(pa.Table.from_arrays(columns, ["id", "score", "score"]), path)
    with pytest.raises(DataError, match=r"a column is there twice|Multiple matches for FieldRef\.Name"):
        tables.read_columns(path, "id", "score")
