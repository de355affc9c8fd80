"""Statistics by ranks, in numpy: they stay the same under any increasing change of scale."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sftmix.types import Float64, Int64

Numbers = npt.NDArray[np.number]


def mean_ranks(values: npt.ArrayLike) -> Float64:
    """Return f64[n], ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a: Numbers, b: Numbers) -> float | None:
    """Return the rank correlation with mean ranks for ties; None if it is undefined."""
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None
    return float(np.corrcoef(mean_ranks(a), mean_ranks(b))[0, 1])


def auc(a: Numbers, b: Numbers) -> float | None:
    """Return P(x > y) + P(x = y) / 2 for x of `a`, y of `b` (Mann-Whitney U / (n_a n_b)); None if one is empty."""
    if not len(a) or not len(b):
        return None
    rank_sum = mean_ranks(np.concatenate([a, b]))[: len(a)].sum()
    return float((rank_sum - len(a) * (len(a) + 1) / 2) / (len(a) * len(b)))


def equal_mass_bins(values: Numbers, n_bins: int) -> Int64:
    """Return i64[n], the bin 0..n_bins-1 of each value, by its place in the order of values.

    bin = floor(n_bins (mean rank - 1/2) / n). Without ties the sizes differ by at most one. Equal values share a bin,
    wherever they stand in the array, so a bin may be large and another empty.
    """
    return np.floor(n_bins * (mean_ranks(values) - 0.5) / max(1, len(values))).astype(np.int64)
