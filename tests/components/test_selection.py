"""Selectors: exactly the rows that were asked for, whatever the order of the file."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftmix.components import S2L, All, Longest, QualityLabel, Random, ScoreAtLeast, WithLabel
from sftmix.components.contracts import check_selection
from sftmix.disk.tables import write_dynamics
from sftmix.types import TrainingDynamics
from sftmix.words.errors import ConfigError, DataError
from sftmix.words.given import spelling
from tests.components.examples import Shares
from tests.components.tables import scores


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.data())
def test_k_examples_are_chosen(n_tokens, data):
    n, table = len(n_tokens), scores(n_tokens)
    k, seed = data.draw(st.integers(1, n)), data.draw(st.integers(0, 3))
    kept, drawn = (check_selection(s, s.select(table, seed=seed), n) for s in (Longest(k=k), Random(k=k)))
    assert len(kept) == len(drawn) == k
    left = np.setdiff1d(np.arange(n), kept)
    assert not len(left) or table.n_tokens[kept].min() >= table.n_tokens[left].max()


def test_longest_orders_equal_lengths_by_id():
    table = scores([5, 7, 5, 5, 9], ids=list("dbcae"))
    assert Longest(k=3).select(table, seed=0).tolist() == [1, 3, 4]


def test_random_selections_of_two_seeds_are_independent():
    table = scores([1] * 1000)
    first, second = (set(Random(k=500).select(table, seed=seed).tolist()) for seed in (0, 1))
    assert 200 < len(first & second) < 300


def test_more_than_there_are_is_an_error():
    for selector in (Longest(), Random(k=1000), Random(k=0)):
        with pytest.raises(ConfigError, match=rf"selector\.k is {selector.k}; allowed: from 1 to 3, the number"):
            selector.select(scores([1, 2, 3]), seed=0)


def test_a_threshold_keeps_its_own_value_and_leaves_out_what_has_none():
    table = scores([4, 2, 7, 3, 3], judge=[4.5, None, 5, 4.49, "4.6"], good=[True, False, None, True, False])
    assert ScoreAtLeast(field="judge", threshold=4.5).select(table, seed=0).tolist() == [0, 2, 4]
    assert ScoreAtLeast(field="good", threshold=1).select(table, seed=0).tolist() == [0, 3]
    assert ScoreAtLeast(field="good", threshold=0).select(table, seed=0).tolist() == [0, 1, 3, 4]
    assert ScoreAtLeast(field="n_tokens", threshold=4).select(table, seed=0).tolist() == [0, 2]
    assert All().select(table, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_a_field_that_is_no_score_is_named_beside_those_there_are():
    table = scores([1, 2], judge=[1.0, None], topic=["", "law"])
    with pytest.raises(ConfigError, match=r"field is 'score'; allowed: a field of the rows: n_tokens, judge, topic"):
        ScoreAtLeast(field="score", threshold=1).select(table, seed=0)
    with pytest.raises(ConfigError, match=r"'topic' is not a column of numbers: .*'law'"):
        ScoreAtLeast(field="topic", threshold=1).select(table, seed=0)
    with pytest.raises(ConfigError, match=r"'judge' is not a column of numbers: int too large"):
        ScoreAtLeast(field="judge", threshold=1).select(scores([1], judge=[10**400]), seed=0)
    with pytest.raises(ConfigError, match=r"'judge' is not a column of numbers: example e1 has nan"):
        ScoreAtLeast(field="judge", threshold=1).select(scores([1, 2], judge=[1.0, math.nan], ids=["e0", "e1"]), seed=0)


def test_labels():
    table = scores([1] * 5, label=["high", None, "low", "high", "mid"])
    assert WithLabel(labels="high").select(table, seed=0).tolist() == [0, 3]
    assert WithLabel(labels=["low", "mid"]).select(table, seed=0).tolist() == [2, 4]
    with pytest.raises(
        ConfigError, match=r"selector\.labels is \['high', 'hihg'\]; allowed: labels of the rows, 'high', 'low'"
    ):
        WithLabel(labels=["high", "hihg"]).select(table, seed=0)
    for labels, labelled in (("high", scores([1])), ([], table)):
        with pytest.raises(ConfigError, match=r"selector\.labels is .*data\.label_field or data\.labels"):
            WithLabel(labels=labels).select(labelled, seed=0)


def test_shares_of_sources_are_chosen_by_id():
    table = scores([1] * 10, source=["a"] * 6 + ["b"] * 3 + [None])
    selector = Shares(field="source", shares={"a": 0.6, "b": 0.4}, k=5)
    rows = selector.select(table, seed=0).tolist()
    assert [sum(row < 6 for row in rows), sum(6 <= row < 9 for row in rows)] == [3, 2]
    assert any(selector.select(table, seed=seed).tolist() != rows for seed in range(1, 9))
    labelled = Shares(field="label", shares={"x": 1.0}, k=1)
    assert labelled.select(scores([1, 1], label=["y", "x"]), seed=0).tolist() == [1]
    own = replace(scores([1, 1]), columns={"label": ["y", "x"]})  # a field of the rows, without data.label_field
    assert labelled.select(own, seed=0).tolist() == [1]
    assert labelled.select(replace(own, label=["x", "y"]), seed=0).tolist() == [0]
    with pytest.raises(ConfigError, match=r"selector\.field is 'label'; allowed: a field of the rows: source"):
        labelled.select(table, seed=0)
    with pytest.raises(ConfigError, match=r"allowed: from 0 to 3 of the 10 examples with source 'b'"):
        Shares(field="source", shares={"a": 0.6, "b": 0.4}, k=10).select(table, seed=0)


@pytest.mark.parametrize(
    ("values", "shares"),
    [
        ([True, False, None], {"true": 0.5, "False": 0.5}),
        ([True, "FALSE", None], {True: 0.5, False: 0.5}),
        ([1, 0, 10], {1: 0.5, "0.0": 0.5}),
        ([1.0, "0", ""], {"1": 0.5, 0.0: 0.5}),
        (["yes", "no", "None"], {"yes": 0.5, "no": 0.5}),
    ],
)
def test_values_of_rows_and_of_options_are_spelt_alike(values, shares):
    """JSON has true, 1 and 1.0, tables of text True and 1.0, and YAML any of them."""
    assert Shares(field="x", shares=shares, k=2).select(scores([1] * 3, x=values), seed=0).tolist() == [0, 1]
    first, second = shares
    labelled = scores([1] * 3, label=[spelling(value) for value in values])
    assert WithLabel(labels=[first]).select(labelled, seed=0).tolist() == [0]
    split = QualityLabel(high=[first], low=[second]).split(labelled, seed=0)
    assert split.group.tolist() == [0, 1, -1]


def test_the_values_that_there_are_are_listed():
    table = scores([1] * 4, x=[True, 2.0, "a", None])
    with pytest.raises(ConfigError, match=r"examples with x 'b': .*; the values there are '', '2', 'a', 'true'"):
        Shares(field="x", shares={"b": 1.0}, k=1).select(table, seed=0)
    many = scores([1] * 500, label=[f"l{i:03}" for i in range(500)])
    with pytest.raises(ConfigError, match=r"labels of the rows, 'l000', .*'l029', \.\.\. \("):
        WithLabel(labels="b").select(many, seed=0)


def test_s2l_spreads_the_choice_over_clusters_of_trajectories(tmp_path):
    """Three kinds of trajectory, 2, 10 and 18 examples of them: of 12, the smallest gives all, the others 5 each."""
    kinds = np.repeat([0, 1, 2], [2, 10, 18])
    curves = np.array([[9.0, 9.0, 9.0], [5.0, 3.0, 1.0], [2.0, 1.0, 0.5]])[kinds]
    curves = curves + np.random.default_rng(0).normal(0, 0.01, curves.shape)
    ids, lengths = [f"e{i}" for i in range(31)], np.arange(1, 32)
    nll = np.vstack([curves, np.ones(3)]) * lengths[:, None]
    scored = np.where(np.arange(31) == 30, 0, lengths)
    dynamics = TrainingDynamics(ids, np.array([1, 2, 3]), nll * (scored > 0)[:, None], scored, np.zeros((31, 3), int))
    path = str(tmp_path / "dynamics.parquet")
    write_dynamics(path, dynamics)
    selector, table = S2L(k=12, dynamics=path, clusters=3), scores(lengths, ids=ids)
    rows = selector.select(table, seed=0)
    assert np.bincount(kinds[rows], minlength=3).tolist() == [2, 5, 5]
    assert rows.tolist() == selector.select(table, seed=0).tolist()
    order = np.random.default_rng(1).permutation(31)
    moved = selector.select(scores(lengths[order], ids=[ids[row] for row in order]), seed=0)
    assert {ids[row] for row in order[moved]} == {ids[row] for row in rows}, "whatever the order of the file"
    assert len(S2L(k=30, dynamics=path).select(table, seed=1)) == 30
    with pytest.raises(ConfigError, match=r"selector\.k is 31; allowed: from 1 to 30, the examples with a trajectory"):
        S2L(k=31, dynamics=path).select(table, seed=0)
    with pytest.raises(DataError, match=r"selector\.dynamics: .*none\.parquet: there is no such file"):
        S2L(k=1, dynamics=str(tmp_path / "none.parquet")).files()
