"""Examples of similar length, padded together: how many token slots they take, and the groups that take the fewest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sftmix.types import Rows

# ---------------------------------------------------------------------------------------- length groups


def token_slots(lengths: Sequence[int], n_segments: int, *, padding_free: bool = False) -> int:
    """Token slots that examples of these lengths are computed in: padded in up to so many groups, or not at all."""
    if padding_free or n_segments >= len(lengths):
        return sum(lengths)
    if n_segments == 1:
        return len(lengths) * max(lengths)
    return int(_best_cuts(np.sort(np.asarray(lengths, dtype=np.float64)), n_segments)[0])


def length_groups(lengths: Sequence[int], n_groups: int) -> list[list[int]]:
    """Partition slots into exactly `n_groups` groups of similar length with the fewest padded tokens.

    Sorted by length the best groups are contiguous, so a small dynamic programme finds them: cost of a group is its
    size times its longest member.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    _, cuts = _best_cuts(np.asarray([lengths[i] for i in order], dtype=np.float64), n_groups)
    groups, end = [], len(order)
    for starts in reversed(cuts):
        start = int(starts[end])
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def _best_cuts(ordered: npt.NDArray[np.float64], n_groups: int) -> tuple[float, list[Rows]]:
    """Padded tokens of ascending lengths in the best groups; for each group, where it starts if it ends at i."""
    size = len(ordered)
    start, end = np.arange(size + 1)[:, None], np.arange(1, size + 1)
    group = np.full((size + 1, size + 1), np.inf)  # [start, end]
    group[:, 1:] = np.where(start < end, (end - start) * ordered, np.inf)
    best = np.full(size + 1, np.inf)
    best[0] = 0.0
    cuts = []
    for _ in range(n_groups):
        cost = best[:, None] + group
        cuts.append(np.argmin(cost, axis=0))
        best = np.min(cost, axis=0)
    return float(best[size]), cuts
