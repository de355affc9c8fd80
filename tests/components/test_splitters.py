"""Splitters: equal halves, determinism, ties and rows without a confidence."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftmix.components import LengthMatched, Median, QualityLabel, Quantile, RandomSplit
from sftmix.components.contracts import check_split
from sftmix.components.splitters import FromFile
from sftmix.disk.tables import write_split
from sftmix.types import Split
from sftmix.words.errors import ConfigError, DataError
from tests.components.tables import scores

CONFIDENCES = st.lists(
    st.one_of(st.floats(max_value=-1, allow_nan=False), st.sampled_from([-1.0, -2.0, float("nan")])),
    min_size=2,
    max_size=40,
).filter(lambda values: np.count_nonzero(~np.isnan(values)) >= 2)


def table_of(confidence, ids=None, label=None):
    return scores([1] * len(confidence), confidence=confidence, ids=ids, label=label)


def test_ties_are_ordered_by_id():
    split = Median().split(table_of([-1.0] * 5, ids=["d", "b", "e", "a", "c"]), seed=0)
    assert split.group.tolist() == [1, 0, 1, 0, -1]


def test_random_split_needs_no_confidence_and_depends_on_the_seed_alone():
    assert not RandomSplit.needs
    ranked, reversed_ = table_of(-np.arange(1.0, 401.0)), table_of(-np.arange(400.0, 0.0, -1.0))
    first = RandomSplit().split(ranked, seed=0).group
    assert np.bincount(first).tolist() == [200, 200]
    np.testing.assert_array_equal(first, RandomSplit().split(reversed_, seed=0).group)
    other = RandomSplit().split(ranked, seed=1).group
    assert 0.4 < (first == other).mean() < 0.6  # two independent halvings of 400 agree on half of the rows
    assert 0.4 < (first == Median().split(ranked, seed=0).group).mean() < 0.6


@given(CONFIDENCES, st.integers(2, 7))
def test_quantiles_are_equal_groups_in_order_of_confidence(confidence, levels):
    table = table_of(confidence)
    scored = np.flatnonzero(~np.isnan(table.confidence))
    if len(scored) < levels:
        with pytest.raises(DataError, match=f"into {levels} groups needs at least {levels} scored examples"):
            Quantile(levels=levels).split(table, seed=0)
        return
    split = check_split(Quantile(levels=levels), Quantile(levels=levels).split(table, seed=0), table)
    assert split.names == tuple(f"level_{k}" for k in range(1, levels + 1))
    sizes = [len(split.rows(level)) for level in range(levels)]
    assert sizes == [len(scored) // levels] * levels
    bounds = [(table.confidence[split.rows(k)].min(), table.confidence[split.rows(k)].max()) for k in range(levels)]
    assert all(lower >= upper for (lower, _), (_, upper) in itertools.pairwise(bounds))
    assert len(np.intersect1d(scored, split.unpaired)) == len(scored) % levels


def test_left_over_rows_of_quantiles_by_hand():
    table = table_of([-1, -2, -3, -4, -5, -6, -7, -8, np.nan])
    assert Quantile(levels=3).split(table, seed=0).group.tolist() == [0, 0, 1, -1, -1, 1, 2, 2, -1]
    assert Quantile().split(table, seed=0).group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, -1]
    halves = Median().split(table, seed=0)
    assert halves.group.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, -1]
    assert halves.names == ("confident", "unconfident")


LABELS = ["good", "poor", None, "fair", "good", "bad"]


def test_quality_labels_are_the_groups():
    table = table_of([np.nan] * 6, label=LABELS)
    splitter = QualityLabel(high="good", low=["poor", "bad"])
    split = check_split(splitter, splitter.split(table, seed=0), table)
    assert split.names == ("high", "low")
    assert split.group.tolist() == [0, 1, -1, -1, 0, 1]
    assert not QualityLabel.needs


@pytest.mark.parametrize(
    ("high", "low", "label", "message"),
    [
        (
            "god",
            "bad",
            LABELS,
            r"splitter\.high is \['god'\]; allowed: labels of the rows, 'bad', 'fair', 'good', 'poor' \(",
        ),
        ("good", ["bad", "worse"], LABELS, r"splitter\.low is \['bad', 'worse'\]; allowed: labels"),
        ("good", "bad", None, r"labels of the rows, none \(from data\.label_field or data\.labels\)"),
        ("good", [], LABELS, r"splitter\.low is \[\]; allowed: labels"),
    ],
)
def test_labels_that_are_not_there_are_named_beside_those_that_are(high, low, label, message):
    with pytest.raises(ConfigError, match=message):
        QualityLabel(high=high, low=low).split(table_of([np.nan] * 6, label=label), seed=0)


def test_a_label_cannot_be_high_and_low():
    with pytest.raises(ConfigError, match=r"splitter\.low is 'good'; allowed: none of splitter\.high, \['good',"):
        QualityLabel(high=["good", "fair"], low="good")


@given(st.lists(st.integers(1, 30), min_size=2, max_size=60), st.integers(0, 3))
def test_length_matched_halves_have_the_same_lengths(n_tokens, seed):
    n, table = len(n_tokens), scores(n_tokens)
    split = LengthMatched().split(table, seed=seed)
    halves = [np.sort(table.n_tokens[rows]) for rows in (split.confident, split.unconfident)]
    assert len(halves[0]) == len(halves[1]) == n // 2
    assert table.n_tokens[split.unpaired].tolist() == sorted(n_tokens)[n // 2 : n // 2 + n % 2]
    # Each half holds one of every two neighbours in length: their order statistics interleave.
    lower, upper = np.minimum(*halves), np.maximum(*halves)
    assert (upper[:-1] <= lower[1:]).all()
    assert abs(int(halves[0].sum()) - int(halves[1].sum())) <= max(n_tokens) - min(n_tokens)


@pytest.mark.parametrize("of_each", [1, 2])
def test_length_matched_coins_are_fair_and_seeded(of_each):
    n_tokens = np.arange(2000) // of_each  # neighbours of different, or of equal length
    table = scores(n_tokens)
    first, other = (LengthMatched().split(table, seed=seed).group for seed in (0, 1))
    assert 430 < (first[::2] == 0).sum() < 570  # 1,000 coins: within 4.4 standard deviations
    assert 860 < (first == other).sum() < 1140


def test_a_split_from_a_file_is_joined_by_id(tmp_path):
    path = tmp_path / "split.parquet"
    write_split(path, ["a", "b", "c", "d"], Split(np.asarray([2, 0, -1, 1], dtype=np.int8), ("x", "y", "z")))
    splitter = FromFile(path=path)
    split = splitter.split(table_of([np.nan] * 4, ids=["d", "c", "b", "a"]), seed=0)
    assert split.names == ("x", "y", "z")
    assert split.group.tolist() == [1, -1, 0, 2]
    assert splitter.files() == [str(path)]
    assert not FromFile.needs


def test_a_split_of_other_examples_is_refused(tmp_path):
    path = tmp_path / "split.parquet"
    write_split(path, ["a", "b", "c"], Split(np.asarray([0, 1, -1], dtype=np.int8), ("confident", "unconfident")))
    message = r"split\.parquet: it is of other examples than the 3 rows"
    with pytest.raises(DataError, match=message):
        FromFile(path=path).split(table_of([np.nan] * 3, ids=["y", "b", "z"]), seed=0)
    pq.write_table(pa.table({"id": [7, None], "group": ["confident", "unconfident"]}), path)
    with pytest.raises(DataError, match="it is of other examples than the 2 rows"):
        FromFile(path=path).split(table_of([np.nan] * 2, ids=["7", "8"]), seed=0)
    with pytest.raises(DataError, match=r"splitter\.path: .*nowhere\.parquet: there is no such file"):
        FromFile(path=tmp_path / "nowhere.parquet").files()


@pytest.mark.parametrize("names", [("a", "b", "b"), ("a", "unpaired"), ("a", 1), tuple(f"g{k}" for k in range(129))])
def test_groups_that_a_file_could_not_tell_apart_are_refused(names):
    """The number of a group is an int8: group 149 would be -107."""
    table = table_of([1.0] * len(names))
    split = Split(group=np.arange(len(names)), names=names)
    said = (
        rf"splitter Median returned {len(names)} groups with the names \['{names[0]}', .*\]; allowed: at most 128 texts"
    )
    with pytest.raises(ConfigError, match=said):
        check_split(Median(), split, table)


def test_a_file_with_more_groups_is_refused(tmp_path):
    names = [f"g{k}" for k in range(150)]
    schema = pa.schema([("id", pa.string()), ("group", pa.string())], metadata={"sftmix.groups": json.dumps(names)})
    path = tmp_path / "split.parquet"
    pq.write_table(pa.table({"id": names, "group": names}, schema=schema), path)
    with pytest.raises(DataError, match=r"split\.parquet: .*150 groups.*at most 128"):
        FromFile(path=path).split(table_of([1.0] * 150, names), seed=0)
