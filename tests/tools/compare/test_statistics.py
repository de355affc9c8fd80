"""The statistics of a table against brute force, hand calculation and scipy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from sftmix.tools.compare.statistics import holm, interval, per_example, seeds_needed, sign_flip


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 9])
def test_the_sign_flip_test_goes_through_every_assignment(n):
    d = normal(n, seed=n) + 0.3
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=n)]
    assert sign_flip(d) == np.mean([total >= abs(d.sum()) - 1e-12 for total in sums])


@pytest.mark.parametrize("n", [1, 2, 5, 6, 10])
def test_all_of_one_sign_and_size_gives_the_smallest_p(n):
    assert sign_flip([0.1] * n) == 2 / 2**n  # 0.1 is not a binary fraction: ties must hold
    assert sign_flip([-0.1] * n) == 2 / 2**n
    assert sign_flip([0.0] * n) == 1.0
    assert sign_flip([0.1, 0.2, -0.3] * min(n, 6)) == 1.0  # the sum is 0, and a little above it in floating point


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, made monotone.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@pytest.mark.parametrize("contrasts", [1, 2, 3, 7, 20])
def test_the_seeds_needed_are_the_fewest_that_can_pass_holm(contrasts):
    n = seeds_needed(contrasts)
    assert n >= 6
    assert 2 / 2**n * contrasts <= 0.05
    assert n == 6 or 2 / 2 ** (n - 1) * contrasts > 0.05


TOKENS = np.tile(np.random.default_rng(9).integers(3, 40, 30).astype(float), (4, 1))


def sums(seed: int) -> np.ndarray:
    return TOKENS * np.random.default_rng(seed).gamma(4, 0.5, (4, 30))


def test_the_interval_over_seeds_and_examples_by_hand():
    """Sums of squares in plain loops, of each cell's part in the ratio found by giving it a little more weight."""
    ours, theirs = sums(1) * np.linspace(0.5, 1.5, 30), sums(2)  # examples differ, too
    d, h = np.empty((4, 30)), 1e-5
    for s, e in itertools.product(range(4), range(30)):
        d[s, e] = 0
        for side, sign in ((ours, 1), (theirs, -1)):
            weights = [np.ones(30), np.ones(30)]
            weights[0][e], weights[1][e] = 1 + h, 1 - h
            up, down = (float(w @ side[s] / (w @ TOKENS[s])) for w in weights)
            d[s, e] += sign * ((up + down) / 2 + 30 * (up - down) / (2 * h))
    mean = sum(d[s, e] for s in range(4) for e in range(30)) / 120
    of_seed = [sum(d[s]) / 30 - mean for s in range(4)]
    of_example = [sum(d[:, e]) / 4 - mean for e in range(30)]
    rest = sum((d[s, e] - mean - of_seed[s] - of_example[e]) ** 2 for s in range(4) for e in range(30)) / (3 * 29)
    seeds = sum(x * x for x in of_seed) / 3
    examples = max(0, sum(x * x for x in of_example) / 29 - rest / 4)
    assert examples > 0
    reach = math.sqrt(stats.t.ppf(0.975, 3) ** 2 * seeds / 4 + stats.t.ppf(0.975, 29) ** 2 * examples / 30)
    assert interval(per_example(ours, TOKENS) - per_example(theirs, TOKENS)) == pytest.approx(
        (mean - reach, mean + reach), rel=1e-6
    )


def test_the_interval_over_seeds_or_examples_alone_is_students():
    for d in (normal(2), normal(3), normal(9), normal(1, 30), normal(4, 1)):
        expected = tuple(stats.ttest_1samp(d.ravel(), 0).confidence_interval())
        assert interval(d) == pytest.approx(expected, rel=1e-12)
    assert interval([1.0]) is interval([[1.0]]) is None


EXPERIMENTS = 2000
ERROR = math.sqrt(0.05 * 0.95 / EXPERIMENTS)
"""Of a share of 95% in so many experiments: 0.005."""


@pytest.mark.parametrize(
    ("n", "spread"),
    [(2, (0.1, 1.0, 1.0)), (6, (0.1, 1.0, 1.0)), (10, (0.1, 1.0, 1.0)), (6, (1.0, 1.0, 1.0)), (6, (0.0, 0.0, 1.0))],
)
def test_the_interval_over_seeds_and_examples_covers_at_least_95_of_100(n, spread):
    """New seeds and new examples (with their numbers of tokens) in each experiment; spread of seeds, examples, cells.

    At least 95%, but for three errors of the experiments; and from six seeds on not much wider than it has to be.
    """
    rng, covered, (seed, example, cell) = np.random.default_rng([n, *map(int, spread)]), [], spread
    for _ in range(EXPERIMENTS):
        tokens = np.tile(rng.integers(20, 60, 50).astype(float), (n, 1))
        own = 0.3 + seed * rng.normal(size=(n, 1)) + example * rng.normal(size=50) + cell * rng.normal(size=(n, 50))
        shared = rng.gamma(4, 0.5, 50)  # what an example has on both sides
        low, high = interval(per_example(tokens * (shared + own), tokens) - per_example(tokens * shared, tokens))
        covered.append(low <= 0.3 <= high)
    assert np.mean(covered) >= 0.95 - 3 * ERROR
    assert n < 6 or np.mean(covered) <= 0.965 + 3 * ERROR
