"""The statistics of a table: few seeds, paired by seed, and no claim that they cannot carry.

Every difference is taken within a seed (same rows, same order), so what seeds have in common cancels. Sources: the
sign-flip test is Fisher's randomisation test (The Design of Experiments, 1935), with the correction of Phipson and
Smyth (2010) where assignments are sampled; the interval is the percentile bootstrap (Efron and Tibshirani, 1993) over
two crossed factors, seeds and examples (Owen, The pigeonhole bootstrap, 2007); the correction for several contrasts is
Holm's (1979); the detectable effect is that of the paired t-test (noncentral t distribution).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftmix.common.rng import generator
from sftmix.types import Float64

MIN_SEEDS = 6
"""Fewest seeds with which anything may be called significant: with 5, the smallest possible p is 2/32 = 0.0625."""
ALPHA = 0.05
POWER = 0.8
LEVEL = 0.95
EXACT_UP_TO = 20
"""Largest number of seeds whose 2^n sign assignments are all gone through."""
SAMPLES = 200_000
RESAMPLES = 5_000

_CHUNK = 1 << 20
"""Numbers held at once by the loops over assignments and resamples."""


def mean_sd(values: Sequence[float] | Float64) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1); None for the deviation of a single value."""
    x = np.asarray(values, dtype=np.float64)
    return float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else None


def smallest_p(n: int) -> float:
    """The smallest two-sided p-value that the sign-flip test of n differences can give: 2 of 2^n assignments."""
    return min(1.0, 2.0 ** (1 - n))


def seeds_needed(contrasts: int, *, alpha: float = ALPHA) -> int:
    """The fewest seeds with which Holm's correction over so many contrasts can reject at least one."""
    return max(MIN_SEEDS, math.ceil(1 + math.log2(contrasts / alpha)))


def sign_flip(differences: Sequence[float] | Float64, *, seed: int = 0, samples: int = SAMPLES) -> float:
    """Two-sided p-value of the mean of n paired differences under the hypothesis that their signs are exchangeable.

    The share of the 2^n sign assignments whose |mean| is at least the observed one; exact up to 20 differences, from
    `samples` assignments drawn with `seed` above that (the observed one counted among them).
    """
    d = np.asarray(differences, dtype=np.float64)
    n, observed = len(d), abs(float(np.sum(differences)))
    bound = observed - 1e-12 * float(np.abs(d).sum())  # equal sums differ by rounding
    exact = n <= EXACT_UP_TO
    total, found, rng = (2**n if exact else samples), 0, generator(seed, "sign flip")
    rows = max(1, _CHUNK // max(n, 1))
    for start in range(0, total, rows):
        size = min(rows, total - start)
        if exact:
            bits = (np.arange(start, start + size, dtype=np.int64)[:, None] >> np.arange(n)) & 1
        else:
            bits = rng.integers(0, 2, size=(size, n))
        found += int((np.abs((1 - 2 * bits) @ d) >= bound).sum())
    return found / total if exact else (found + 1) / (total + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the k-th smallest times (m - k + 1), made monotone, at most 1."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return [float(v) for v in adjusted]


def smallest_effect(sd: float, n: int, *, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """The true mean difference that a two-sided paired t-test of n seeds finds with probability `power`.

    sd  standard deviation of the paired differences, in the unit of the metric (as is the result)
    None where n differences have no standard deviation.
    """
    if n < 2:
        return None
    from scipy.optimize import brentq
    from scipy.stats import chi2, norm, t

    # The noncentral t distribution as the mean of normal ones over the sample's standard deviation, which is chi with
    # n - 1 degrees of freedom; Gauss-Legendre over its quantiles (scipy.stats.nct gives NaN in the far tail).
    nodes, weights = np.polynomial.legendre.leggauss(256)
    bounds = t.ppf(1 - alpha / 2, n - 1) * np.sqrt(chi2.ppf((nodes + 1) / 2, n - 1) / (n - 1))

    def missing(effect: float) -> float:
        shift = effect * math.sqrt(n)
        return float(weights @ (norm.sf(bounds - shift) + norm.cdf(-bounds - shift))) / 2 - power

    return sd * float(brentq(missing, 0.0, 20.0))  # in units of sd, n = 2 needs about 12 and every larger n less


@dataclass(frozen=True, slots=True)
class Counts:
    """A metric that is a ratio of sums over examples, for one variant: f64[S, N] each, S seeds, N examples.

    numerator    per example, e.g. the sum of its tokens' NLL
    denominator  per example, e.g. its number of tokens
    """

    numerator: Float64
    denominator: Float64

    def ratio(self, seeds: Float64, examples: Float64) -> Float64:
        """The metric under weights f64[R, S] of the seeds and f64[R, N] of the examples: f64[R]."""
        top = ((seeds @ self.numerator) * examples).sum(axis=1)
        return top / ((seeds @ self.denominator) * examples).sum(axis=1)


def bootstrap_seeds(
    differences: Sequence[float] | Float64, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95% percentile interval of the mean of paired differences, seeds drawn with replacement; None for one seed."""
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2:
        return None
    drawn = generator(seed, "bootstrap").integers(0, len(d), size=(resamples, len(d)))
    return _interval(d[drawn].mean(axis=1))


def bootstrap_two_level(
    ours: Counts, theirs: Counts, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95% percentile interval of (ours - theirs), seeds and examples drawn with replacement, independently.

    Both variants get the same draws (they are paired by seed and by example), and a drawn example counts in all drawn
    seeds: the two factors are crossed. With one seed only the examples vary.
    """
    n_seeds, n_examples = ours.numerator.shape
    if theirs.numerator.shape != ours.numerator.shape:
        raise ValueError(f"shapes differ: {ours.numerator.shape} and {theirs.numerator.shape}")
    rng, parts = generator(seed, "bootstrap"), []
    rows = max(1, _CHUNK // n_examples)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=size).astype(np.float64)
        examples = rng.multinomial(n_examples, np.full(n_examples, 1 / n_examples), size=size).astype(np.float64)
        parts.append(ours.ratio(seeds, examples) - theirs.ratio(seeds, examples))
    return _interval(np.concatenate(parts))


def _interval(values: Float64) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
