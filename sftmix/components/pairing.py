"""Pair samplers: the pairs of examples that are mixed in an epoch."""

import math

import numpy as np

from sftmix.components.base import PairSampler
from sftmix.ranks.rng import generator
from sftmix.types import Rows, Scores, Split
from sftmix.words.errors import DataError


class RandomPairs(PairSampler):
    """The paper's pairing: every epoch a fresh random matching of confident with unconfident examples, in random order.

    If the groups differ in size, the smaller one is repeated in new orders, which are mixed. With more than two groups,
    the first is matched with the last; the examples between get NTP alone.
    """

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        rng = generator(seed, "pairs", epoch)
        pairs = between(split.confident, split.unconfident, rng)
        # Repeats carry no NTP: left at the end of the epoch, they would leave the smaller group without any there.
        return pairs if abs(len(split.confident) - len(split.unconfident)) < 2 else rng.permutation(pairs)


def between(upper: Rows, lower: Rows, rng: np.random.Generator) -> Rows:
    """Return i64[P, 2]: two groups in random order; the smaller one is repeated, each time in a new order."""
    if not len(upper) or not len(lower) or np.array_equal(upper, lower):  # a split of one group: first is last
        raise DataError(
            f"pairing needs two groups with examples, and those to be paired have {len(upper)} and {len(lower)}, or "
            "are one and the same; choose another splitter, or give more rows"
        )
    columns = []
    n_pairs = max(len(upper), len(lower))
    for rows in (upper, lower):
        # 2 rows beside 5: three orders of the 2, one after the other, cut to 5
        passes = [rng.permutation(rows) for _ in range(math.ceil(n_pairs / len(rows)))]
        columns.append(np.concatenate(passes)[:n_pairs])
    return np.stack(columns, axis=1)


def within(rows: Rows, scores: Scores, rng: np.random.Generator) -> Rows:
    """Return i64[P, 2]: a random matching of rows with each other; column 0 the more confident, if scored.

    Rows may stand more than once, each in at most half of the places. A draw that pairs a row with itself is repeated.
    """
    pairs = rows[:0].reshape(0, 2)
    for _ in range(1000):  # a run refuses what the last draw may leave
        pairs = rng.permutation(rows)[: len(rows) // 2 * 2].reshape(-1, 2)
        if (pairs[:, 0] != pairs[:, 1]).all():
            break
    confidence = scores.confidence[pairs]
    swapped = confidence[:, 0] < confidence[:, 1]  # False for NaN: without scores pairs stay as drawn
    return np.where(swapped[:, None], pairs[:, ::-1], pairs)
