"""Statistics by ranks against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from sftmix.measure.ranks import auc, equal_mass_bins, mean_ranks, spearman


def test_equal_values_share_the_mean_of_their_ranks():
    assert mean_ranks([5.0, 1.0, 5.0, 7.0, 5.0]).tolist() == [3.0, 1.0, 3.0, 5.0, 3.0]


def test_spearman_has_mean_ranks_for_ties_and_is_undefined_for_constants():
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10, 20, 40])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2.0, 2.0, 4.0]), np.array([1, 1, 0, -5])) == pytest.approx(-0.8333333333)
    assert spearman(np.array([1.0, 1.0]), np.array([1, 2])) is None
    assert spearman(np.array([1.0, 2.0]), np.array([3, 3])) is None
    assert spearman(np.array([1.0]), np.array([3])) is None


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 37), rng.integers(1, 8, 23)
    wins = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    assert auc(a, b) == pytest.approx(wins / (37 * 23), rel=1e-14)
    assert auc(b, a) == pytest.approx(1 - wins / (37 * 23), rel=1e-14)
    assert auc(np.array([3]), np.array([3, 3])) == 0.5
    assert auc(a, a[:0]) is None


def test_bins_have_equal_mass_and_never_part_equal_values():
    values = np.random.default_rng(1).permutation(101) * 1.0
    bins = equal_mass_bins(values, 15)
    assert set(np.bincount(bins, minlength=15)) == {6, 7}
    assert np.all(np.diff(bins[np.argsort(values)]) >= 0)
    tied = np.array([0.1, 0.5, 0.5, 0.5, 0.9, 0.5])
    assert equal_mass_bins(tied, 3).tolist() == [0, 1, 1, 1, 2, 1]
    assert equal_mass_bins(np.full(7, 2.0), 4).tolist() == [2] * 7
    assert len(equal_mass_bins(np.empty(0), 4)) == 0
