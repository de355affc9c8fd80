"""Pair samplers: perfect matchings, fresh each epoch, a pure function of seed and epoch."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftmix.batches.order import epoch_units
from sftmix.components import (
    AnyPairs,
    ConfidenceGapPairs,
    LengthMatchedPairs,
    LevelPairs,
    PairSampler,
    PermutedPairs,
    RandomPairs,
    SameGroupPairs,
)
from sftmix.components.contracts import check_pairs
from sftmix.components.pairing import between
from sftmix.pipeline.arm_order import pairs_by
from sftmix.ranks.rng import generator
from sftmix.testing import score_tables
from sftmix.testing.shared import permuted
from sftmix.types import Split
from sftmix.words.errors import ConfigError, DataError
from tests.components.examples import ByConfidence
from tests.components.tables import scores

SAMPLERS = [RandomPairs(), LengthMatchedPairs(), LengthMatchedPairs(window=1)]


def halves(n, seed=0):
    """n rows in two halves, the last one unpaired where n is odd."""
    group = np.random.default_rng(seed).permutation(np.arange(n) % 2).astype(np.int8)
    if n % 2:
        group[np.flatnonzero(group == 0)[-1]] = -1
    return Split(group=group, names=("confident", "unconfident"))


def pairs_of(sampler, split, table=None, *, epoch=0, seed=0):
    table = scores([1] * len(split.group)) if table is None else table
    return sampler.pairs(split, table, epoch=epoch, seed=seed)


GROUPS = st.lists(st.sampled_from([-1, 0, 1]), min_size=2, max_size=60).filter(lambda g: 0 in g and 1 in g)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.spec()["class_path"])
@given(group=GROUPS, epoch=st.integers(0, 3), seed=st.integers(0, 3), data=st.data())
def test_pairs_cover_each_row_as_evenly_as_they_can(sampler, group, epoch, seed, data):
    n_tokens = data.draw(st.lists(st.integers(1, 50), min_size=len(group), max_size=len(group)))
    split = Split(group=np.asarray(group, dtype=np.int8), names=("confident", "unconfident"))
    pairs = sampler.pairs(split, scores(n_tokens), epoch=epoch, seed=seed)
    larger = max(len(split.confident), len(split.unconfident))
    assert pairs.shape == (larger, 2)
    assert pairs.dtype == np.int64
    for column, rows in ((pairs[:, 0], split.confident), (pairs[:, 1], split.unconfident)):
        found, counts = np.unique(column, return_counts=True)
        np.testing.assert_array_equal(found, rows)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("sampler", "most"),
    [(each, 40) for each in SAMPLERS[:2]]
    + [(each, 10) for each in (LevelPairs(), SameGroupPairs(), AnyPairs(), ConfidenceGapPairs(), PermutedPairs())],
    ids=lambda s: type(s).__name__,
)
def test_every_epoch_and_seed_has_its_own_matching_and_order(sampler, most):
    n_tokens = np.random.default_rng(1).integers(5, 300, size=400)
    split, table = halves(400), scores(n_tokens, confidence=-np.arange(1.0, 401.0))
    epochs = [sampler.pairs(split, table, epoch=epoch, seed=seed) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    for a in range(3):
        for b in range(a):
            assert (epochs[a][:, 0] == epochs[b][:, 0]).mean() < 0.05
            assert len(set(map(tuple, epochs[a].tolist())) & set(map(tuple, epochs[b].tolist()))) < most


@pytest.mark.parametrize(
    ("sampler", "split", "couples", "bound"), [(RandomPairs(), halves(8), 16, 33.7), (AnyPairs(), halves(6), 15, 42.6)]
)
def test_partners_are_uniform(sampler, split, couples, bound):
    """Chi-squared over all couples of rows, each expected 1,000 times; 9 and 14 degrees of freedom, p = 1e-4."""
    drawn = [pairs_of(sampler, split, epoch=epoch) for epoch in range(1000 * couples // (len(split.group) // 2))]
    counts = Counter(map(tuple, np.sort(np.concatenate(drawn), axis=1).tolist()))
    assert len(counts) == couples
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < bound


@pytest.mark.parametrize("sampler", [*SAMPLERS, LevelPairs()], ids=lambda s: s.spec()["class_path"])
def test_repeats_of_a_smaller_group_are_not_left_to_the_end(sampler):
    """They carry no NTP, which the smaller group would have at the start of the epoch alone."""
    split = Split(group=(np.arange(1000) % 10 > 0).astype(np.int8), names=("confident", "unconfident"))
    pairs = pairs_of(sampler, split, scores(np.random.default_rng(0).integers(5, 200, 1000)))
    _, first = np.unique(pairs[:, 0], return_index=True)
    # The first of 9 places of a row has a mean of 90 places of 900 and a deviation of 80: 110 is 2.5 of 100's.
    assert first.mean() == pytest.approx(90, abs=20)
    assert first.max() > 200


def test_a_single_repeat_stays_at_the_end():
    """As in earlier releases: the halves of an odd number of rows differ by one."""
    split = Split(group=np.array([0, 0, 0, 1, 1, 1, 1], dtype=np.int8), names=("confident", "unconfident"))
    rng = generator(5, "pairs", 2)
    upper, again, lower = rng.permutation([0, 1, 2]), rng.permutation([0, 1, 2]), rng.permutation([3, 4, 5, 6])
    expected = np.stack([[*upper, again[0]], lower], axis=1)
    np.testing.assert_array_equal(pairs_of(RandomPairs(), split, epoch=2, seed=5), expected)


@given(group=GROUPS, size=st.integers(1, 5), epoch=st.integers(0, 2), seed=st.integers(0, 2))
def test_permuted_pairs_have_the_batches_of_random_pairs(group, size, epoch, seed):
    """The same examples as often in each global batch, in pairs of two, the more confident in column 0."""
    split = Split(group=np.asarray(group, dtype=np.int8), names=("confident", "unconfident"))
    table = scores([1] * len(group), confidence=np.random.default_rng(seed).permutation(len(group)).astype(float))
    whole, permuted = (
        pairs_of(sampler, split, table, epoch=epoch, seed=seed)
        for sampler in (RandomPairs(), PermutedPairs(global_batch_size=2 * size))
    )
    for start in range(0, len(whole), size):
        one, other = (np.sort(pairs[start : start + size], axis=None) for pairs in (whole, permuted))
        np.testing.assert_array_equal(one, other)
    check_pairs(PermutedPairs(), permuted, split, table)
    assert (table.confidence[permuted[:, 0]] > table.confidence[permuted[:, 1]]).all()


def test_permuted_partners_are_uniform_within_a_batch():
    """Chi-squared over the 105 matchings of a batch of eight, each expected 100 times; 104 degrees of freedom, 1e-4."""
    split = halves(8)
    drawn = [pairs_of(PermutedPairs(global_batch_size=8), split, epoch=epoch) for epoch in range(10_500)]
    counts = Counter(tuple(sorted(map(tuple, np.sort(pairs, axis=1).tolist()))) for pairs in drawn)
    assert len(counts) == 105
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 164
    crossing = np.mean([split.group[pairs[:, 0]] != split.group[pairs[:, 1]] for pairs in drawn])
    assert abs(crossing - 4 / 7) < 0.01


def test_length_matching_mixes_more_tokens():
    split, n_tokens = halves(1000), np.random.default_rng(3).integers(1, 300, size=1000)

    def mixed(sampler):
        return n_tokens[pairs_of(sampler, split, scores(n_tokens))].min(axis=1).sum()

    ranked = [np.sort(n_tokens[rows]) for rows in (split.confident, split.unconfident)]
    assert mixed(LengthMatchedPairs(window=1)) == np.minimum(*ranked).sum()  # the best that any matching can do
    assert mixed(LengthMatchedPairs()) > 0.95 * np.minimum(*ranked).sum() > 1.2 * mixed(RandomPairs())


def test_only_the_first_and_last_of_several_groups_are_paired_and_must_not_be_empty():
    split = Split(group=np.asarray([2, 1, 0, 1, 2, 0], dtype=np.int8), names=("high", "middle", "low"))
    pairs = pairs_of(RandomPairs(), split)
    assert [sorted(column) for column in pairs.T.tolist()] == [[2, 5], [0, 4]]
    with pytest.raises(DataError, match="two groups with examples, and those to be paired have 4 and 0"):
        pairs_of(RandomPairs(), Split(split.group % 2, split.names))


def test_a_smaller_group_is_gone_through_in_a_new_order_each_time():
    split = Split(group=np.asarray([0] * 60 + [1] * 20, dtype=np.int8), names=("confident", "unconfident"))
    passes = between(split.confident, split.unconfident, np.random.default_rng(0))[:, 1].reshape(3, 20)
    for one in passes:
        assert sorted(one.tolist()) == list(range(60, 80))
    assert len(set(map(tuple, passes.tolist()))) == 3


# ------------------------------------------------------------------------------------ levels and controls

LEVELS = st.lists(st.integers(-1, 4), min_size=2, max_size=60)


def levels(group, n_levels=5):
    return Split(group=np.asarray(group, dtype=np.int8), names=tuple(f"level_{k + 1}" for k in range(n_levels)))


def partners(rule, n_levels):
    """The levels that are mixed under a rule, told another way: as a set of (upper, lower)."""
    all_pairs = {(a, b) for a in range(n_levels) for b in range(a, n_levels)}
    if rule == "extremes":
        return {(0, n_levels - 1)}
    if rule == "mirrored":
        return {(a, b) for a, b in all_pairs if a + b == n_levels - 1}
    even = {(a, b) for a, b in all_pairs if a % 2 == 0 and b == a + 1}
    return even | ({(n_levels - 1, n_levels - 1)} if n_levels % 2 else set())


@pytest.mark.parametrize("rule", ["mirrored", "neighbours", "extremes"])
@given(n_levels=st.integers(2, 7), size=st.integers(2, 8), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_level_pairs_use_every_row_of_equal_levels_once(rule, n_levels, size, seed, epoch):
    group = generator(seed, "test").permutation(np.repeat(np.arange(n_levels), size))
    split = levels(group, n_levels)
    confidence = -group - np.linspace(0, 0.5, len(group))
    pairs = LevelPairs(rule=rule).pairs(split, scores([1] * len(group), confidence=confidence), epoch=epoch, seed=seed)
    assert pairs.dtype == np.int64
    assert {(a, b) for a, b in split.group[pairs].tolist()} == partners(rule, n_levels)
    assert (confidence[pairs[:, 0]] >= confidence[pairs[:, 1]]).all()
    rows, counts = np.unique(pairs, return_counts=True)
    assert (counts == 1).all()
    used = np.isin(split.group, [level for pair in partners(rule, n_levels) for level in pair])
    alone = [a for a, b in partners(rule, n_levels) if a == b] if size % 2 else []
    assert used.sum() - len(rows) == len(alone)  # a level within itself leaves one of an odd number out


@pytest.mark.parametrize("sampler", [SameGroupPairs(), AnyPairs()], ids=lambda s: type(s).__name__)
@given(group=LEVELS, seed=st.integers(0, 3), epoch=st.integers(0, 3), data=st.data())
def test_the_controls_take_all_that_are_not_unpaired(sampler, group, seed, epoch, data):
    split = levels(group)
    confidence = data.draw(st.lists(st.floats(-9, -1), min_size=len(group), max_size=len(group)))
    table, sizes = scores([1] * len(group), confidence=confidence), [len(split.rows(k)) for k in range(5)]
    pairs = pairs_of(sampler, split, table, epoch=epoch, seed=seed)
    same_group = isinstance(sampler, SameGroupPairs)
    expected = sum(2 * (size // 2) for size in sizes) if same_group else sum(sizes) // 2 * 2
    assert len(np.unique(pairs)) == pairs.size == expected
    assert (split.group[pairs] >= 0).all()
    assert not same_group or (split.group[pairs[:, 0]] == split.group[pairs[:, 1]]).all()
    assert (table.confidence[pairs[:, 0]] >= table.confidence[pairs[:, 1]]).all()


# ----------------------------------------------------------------------------------- continuous confidence


@given(table=score_tables(max_size=50), gap=st.sampled_from([0.01, 0.25, 0.4, 0.5]), epoch=st.integers(0, 2))
def test_gap_pairs_are_a_matching_of_distant_ranks(table, gap, epoch):
    split, sampler = levels([-1 if i % 7 == 3 else 0 for i in range(len(table))], 1), ConfidenceGapPairs(min_gap=gap)
    confidence, ids = table.confidence.tolist(), table.id
    if np.isnan(confidence).all():
        return
    usable = [i for i in range(len(ids)) if split.group[i] == 0 and not np.isnan(confidence[i])]
    pairs = pairs_of(sampler, split, table, epoch=epoch)
    ranked = [i for _, _, i in sorted((-confidence[i], ids[i], i) for i in usable)]
    if len(ranked) % 2:
        del ranked[len(ranked) // 2]
    assert sorted(pairs.reshape(-1).tolist()) == sorted(ranked)
    distance = [ranked.index(u) - ranked.index(c) for c, u in pairs.tolist()]
    assert min(distance, default=len(ranked)) >= gap * len(ranked)
    # By ids, whatever the order of the file.
    order = np.random.default_rng(epoch).permutation(len(ids))
    again = order[pairs_of(sampler, Split(split.group[order], split.names), permuted(table, order), epoch=epoch)]
    assert again.tolist() == pairs.tolist()


def test_the_smallest_distance_is_the_share_that_is_written():
    """Of 100 examples 0.07 are 7, where 0.07 * 100 is 7.000000000000001."""
    table = scores(np.full(100, 5), confidence=-np.arange(100.0))
    split, sampler = levels([0] * 100, 1), ConfidenceGapPairs(min_gap=0.07)
    drawn = [np.diff(pairs_of(sampler, split, table, epoch=epoch)).min() for epoch in range(100)]
    assert min(drawn) == 7


@pytest.mark.slow
def test_all_matchings_of_six_ranks_that_keep_the_gap_are_equally_likely():
    """Six ranks at least 2 apart: five perfect matchings. Chi-squared, 4 degrees of freedom, bound at p = 1e-4."""
    table, split = scores([1] * 6, confidence=-np.arange(1.0, 7.0)), levels([0] * 6, 1)
    drawn = [pairs_of(ConfidenceGapPairs(min_gap=0.3), split, table, epoch=epoch).tolist() for epoch in range(1000)]
    counts = Counter(tuple(sorted(map(tuple, pairs))) for pairs in drawn)
    orders = [order for order in permutations(range(6)) if all(order[k + 1] - order[k] >= 2 for k in (0, 2, 4))]
    assert set(counts) == {tuple(sorted((order[:2], order[2:4], order[4:]))) for order in orders}
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 23.6


def test_by_confidence_is_a_curriculum():
    confidence = [0.2, np.nan, -3.0, 0.9, 0.2, -0.5, 0.7]
    table, split = scores([1] * 7, confidence=confidence), levels([0, -1, 1, 0, 1, 1, -1], 2)
    for epoch in (0, 3):
        assert pairs_of(ByConfidence(), split, table, epoch=epoch, seed=epoch).tolist() == [[3, 0], [4, 5]]
    pairs = pairs_of(ByConfidence(first="unconfident"), split, table)
    units = epoch_units(7, pairs, epoch=0, seed=0)
    assert [[slot.row for slot in unit] for unit in units if len(unit) == 2] == [[4, 5], [3, 0]]
    assert sorted(slot.row for unit in units for slot in unit) == list(range(7))


class Given(PairSampler):
    """The pairs that it is made with."""

    def __init__(self, *, rows: list):
        self.rows = rows

    def pairs(self, split, scores, *, epoch, seed):
        return np.asarray(self.rows)


TABLE = scores([5] * 6)
THIRDS = Split(group=np.asarray([0, 1, 0, 1, 0, -1], dtype=np.int8), names=("confident", "unconfident"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0, 1], [2, 2], [4, 4]], "pair 1: [2 2] (one of 2); allowed: two different rows that have a group"),
        ([[5, 3], [2, 5]], "pair 0: [5 3] (one of 2); allowed: two different rows that have a group"),
        ([[0, 1], [2, 6]], "rows 0 to 6; allowed: 0 to 5"),
        ([[0, 1], [2, -1]], "rows -1 to 2; allowed: 0 to 5"),
    ],
)
def test_a_row_with_itself_of_no_group_or_beyond_the_data_is_refused(rows, said):
    with pytest.raises(ConfigError) as told:  # as in every epoch of a run
        pairs_by(lambda epoch: (THIRDS, TABLE), Given(rows=rows), seed=0)(2)
    assert str(told.value).startswith(f"pairing Given returned {said}")


def test_pairs_that_are_documented_are_kept():
    """A row may be in several pairs, rows may be in none, and both of a pair may be of one group."""
    rows = [[0, 1], [0, 3], [2, 1], [0, 1], [0, 2]]
    found = check_pairs(Given(rows=rows), np.asarray(rows, dtype=np.int32), THIRDS, TABLE)
    assert found.dtype == np.int64
    assert found.tolist() == rows
    assert check_pairs(Given(rows=[]), np.empty((0, 2), dtype=np.int64), THIRDS, TABLE).shape == (0, 2)
