"""The statistics of a table: few seeds, paired by seed, and no claim that they cannot support.

Every difference is taken within a seed, so an effect of the seed on both sides cancels: the held-out rows always,
training rows and their order if both sides share them (each contrast says whether they do). Sources: the sign-flip test
is Fisher's randomisation test (The Design of Experiments, 1935); the correction for several contrasts is Holm's (1979);
the intervals are Student's, and those over seeds and examples follow Banerjee (Approximate confidence interval for
linear functions of means of k populations when the population variances are not equal, 1960).
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from sftmix.types import Float64

MIN_SEEDS = 6
"""Fewest seeds with which a result may be called significant: with 5, the smallest possible p is 2/32 = 0.0625."""
ALPHA = 0.05
MAX_SEEDS = 20
"""Most seeds of a table: all 2^n sign assignments are gone through."""


def mean_sd(values: Sequence[float] | Float64) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (ddof 1); None for the deviation of a single value."""
    x = np.asarray(values)
    return float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else None


def seeds_needed(contrasts: int) -> int:
    """Return the smallest number of seeds with which Holm's correction over so many contrasts can reject one.

    The smallest two-sided p of n differences counts 2 of 2^n assignments.
    """
    # 2 / 2^n * contrasts <= ALPHA: 1 contrast needs 6 seeds, 3 need 7, 20 need 10.
    return max(MIN_SEEDS, math.ceil(1 + math.log2(contrasts / ALPHA)))


def sign_flip(differences: Sequence[float] | Float64) -> float:
    """Return the exact two-sided p-value of the mean of n <= MAX_SEEDS paired differences with exchangeable signs.

    It is the share of the 2^n sign assignments whose |mean| is at least the observed one.
    """
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])  # 1, 2, 4 -> 7, 5, 3, 1, -1, -3, -5, -7
    bound = abs(sums[0]) - 1e-12 * sums.max()  # the first is the observed one; rounding makes equal sums differ
    return float((np.abs(sums) >= bound).mean())  # 1, 2, 3 -> 0.25: only +++ and ---


def holm(p_values: Sequence[float | None]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given: the k-th smallest times (m - k + 1), monotone, at most 1.

    A None counts as one of the m, and gives NaN.
    """
    import pandas as pd

    p = pd.Series(p_values, dtype=np.float64).sort_values()  # None is sorted to the end, and stays NaN
    # 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, of which the last becomes 0.06.
    return (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1.0).sort_index().tolist()


def per_example(numerator: Float64, denominator: Float64) -> Float64:
    """Return f64[S, N] of a metric that is a ratio of sums over examples: its part of each, of S seeds and N examples.

    The mean over examples is the metric of each seed, and the spread is the effect of the examples. It is the linear
    part of a ratio: its value plus the example's residual numerator, in units of the mean denominator.

    numerator    f64[S, N], e.g. the sum of an example's NLL over its tokens
    denominator  f64[S, N], e.g. its number of tokens
    """
    top, bottom = (x.mean(axis=1, keepdims=True) for x in (numerator, denominator))
    # NLL 10 and 30 of 5 and 10 tokens: parts of 2.22 and 3.11, whose mean is 40/15.
    return top / bottom + (numerator - top / bottom * denominator) / bottom


def interval(differences: Sequence[float] | Float64) -> tuple[float, float] | None:
    """Return the 95% interval of the mean of paired differences; None for a single one.

    differences  f64[S], of each seed: Student's interval, exact for normal differences with any number of seeds from 2;
                 or f64[S, N], of each example as well: over other seeds and other examples

    Seeds and examples are crossed: an example is the same at all seeds. The squared half-widths of Student's intervals
    over seeds and over examples are added (Banerjee: this covers at least 95% if both means are normal; of a ratio of
    sums over rows of Alpaca's lengths that is so from 100 rows on: with 50 it was 0.94 to 0.96, with 10 0.90 to 0.95).
    The spread of the examples' means also holds the spread of single cells; the seeds' holds it already, so it is
    subtracted. With one seed only the examples vary, and with one example only the seeds.
    """
    d = np.asarray(differences).reshape(len(differences), -1)  # [S, N]; of seeds alone N is 1
    n_seeds, n_examples = d.shape
    by_seed, by_example, mean = d.mean(axis=1), d.mean(axis=0), float(d.mean())
    free = max(1, (n_seeds - 1) * (n_examples - 1))
    # Variance of a mean of n_seeds cells: what neither seed nor example explains, as in an ANOVA of two ways.
    of_cells = ((d - by_seed[:, None] - by_example + mean) ** 2).sum() / free / n_seeds
    squared = 0.0
    for means, known in ((by_seed, 0.0), (by_example, of_cells)):
        if (n := len(means)) > 1:
            variance = max(0.0, means.var(ddof=1) - known)  # chance may make it less than 0
            squared += stdtrit(n - 1, 1 - ALPHA / 2) ** 2 * (variance / n)
    half = math.sqrt(squared)
    return (mean - half, mean + half) if d.size > 1 else None
