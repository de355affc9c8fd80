"""The statistics of a table against brute force, hand calculation and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from sftmix.compare.statistics import (
    EXACT_UP_TO,
    Counts,
    bootstrap_seeds,
    bootstrap_two_level,
    holm,
    mean_sd,
    seeds_needed,
    sign_flip,
    smallest_effect,
    smallest_p,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_mean_and_standard_deviation():
    assert mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt((16 + 1 + 25) / 9 / 2)))
    assert mean_sd([3.0]) == (3.0, None)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 9])
def test_the_sign_flip_test_goes_through_every_assignment(n):
    d = normal(n, seed=n) + 0.3
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=n)]
    assert sign_flip(d) == np.mean([total >= abs(d.sum()) - 1e-12 for total in sums])


def test_the_sign_flip_test_is_scipys():
    d = normal(7, seed=3) + 0.5
    theirs = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(d) == pytest.approx(theirs.pvalue, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 10])
def test_all_of_one_sign_and_size_gives_the_smallest_p(n):
    assert sign_flip([0.1] * n) == smallest_p(n) == min(1.0, 2 / 2**n)  # 0.1 is not a binary fraction: ties must hold
    assert sign_flip([-0.1] * n) == smallest_p(n)
    assert sign_flip([0.0] * n) == 1.0


def test_above_20_differences_the_assignments_are_sampled_reproducibly():
    d = normal(EXACT_UP_TO + 5, seed=1) + 0.35
    p = sign_flip(d, seed=1, samples=50_000)
    assert p == sign_flip(d, seed=1, samples=50_000)
    assert p == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=0.3)  # another test of the same hypothesis
    assert sign_flip(np.full(40, 1.0), samples=1000) == 1 / 1001  # never 0: the observed one counts


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, made monotone.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@pytest.mark.parametrize("n", [2, 3, 6, 20])
def test_the_smallest_effect_is_found_with_the_power_it_promises(n):
    effect = smallest_effect(0.7, n)
    assert effect is not None
    shift, critical = effect / 0.7 * math.sqrt(n), stats.t.ppf(0.975, n - 1)
    power = stats.nct.sf(critical, n - 1, shift)  # the other tail is below 1e-7 here, and NaN in scipy
    assert power == pytest.approx(0.8, abs=1e-5)
    assert smallest_effect(1.4, n) == pytest.approx(2 * effect)
    assert smallest_effect(0.7, n + 1) < effect


def test_the_smallest_effect_by_simulation():
    effect = smallest_effect(1.0, 6)
    assert effect is not None
    p = stats.ttest_1samp(normal(20_000, 6) + effect, 0, axis=1).pvalue
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.01)
    assert smallest_effect(1.0, 1) is None


@pytest.mark.parametrize("contrasts", [1, 2, 3, 7, 20])
def test_the_seeds_needed_are_the_fewest_that_can_pass_holm(contrasts):
    n = seeds_needed(contrasts)
    assert n >= 6
    assert smallest_p(n) * contrasts <= 0.05
    assert n == 6 or smallest_p(n - 1) * contrasts > 0.05


def test_the_interval_over_seeds_is_that_of_the_resampled_means():
    d = normal(8, seed=5)
    low, high = bootstrap_seeds(d, resamples=40_000)
    reference = stats.bootstrap((d,), np.mean, method="percentile", n_resamples=40_000, rng=np.random.default_rng(0))
    assert (low, high) == pytest.approx(tuple(reference.confidence_interval), abs=0.02)
    assert bootstrap_seeds(d) == bootstrap_seeds(d)
    assert bootstrap_seeds([1.0]) is None


def counts(seed: int, *, n_seeds: int = 4, n_examples: int = 30) -> Counts:
    rng = np.random.default_rng(seed)
    tokens = np.tile(np.random.default_rng(9).integers(3, 40, n_examples).astype(float), (n_seeds, 1))
    return Counts(numerator=tokens * rng.gamma(4, 0.5, (n_seeds, n_examples)), denominator=tokens)


def test_the_interval_over_seeds_and_examples_is_that_of_a_naive_loop():
    ours, theirs = counts(1), counts(2)
    rng, found = np.random.default_rng(0), []
    for _ in range(4000):
        s, e = rng.integers(0, 4, 4), rng.integers(0, 30, 30)
        at = np.ix_(s, e)
        ratios = [side.numerator[at].sum() / side.denominator[at].sum() for side in (ours, theirs)]
        found.append(ratios[0] - ratios[1])
    assert bootstrap_two_level(ours, theirs, resamples=20_000) == pytest.approx(
        tuple(np.quantile(found, [0.025, 0.975])), abs=0.02
    )


def test_a_difference_without_spread_has_no_width_and_examples_add_some():
    ours = counts(1)
    shifted = Counts(numerator=ours.numerator - 0.25 * ours.denominator, denominator=ours.denominator)
    assert bootstrap_two_level(ours, shifted) == pytest.approx((0.25, 0.25), abs=1e-12)
    one = Counts(numerator=ours.numerator[:1], denominator=ours.denominator[:1])
    other = Counts(numerator=counts(2).numerator[:1], denominator=ours.denominator[:1])
    low, high = bootstrap_two_level(one, other)
    assert high - low > 0.05  # one seed: the examples alone
    with pytest.raises(ValueError, match="shapes differ"):
        bootstrap_two_level(ours, one)
