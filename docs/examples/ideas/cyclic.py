"""A cyclic curriculum (arXiv 2605.30334): easy to hard and back; `--objective NTP --order cyclic.Cyclic`."""

import numpy as np

from sftmix.components import Need, Order
from sftmix.components.component import require
from sftmix.types import Rows, Scores


class Cyclic(Order):
    """An epoch goes through the ranks of confidence several times, each time through other rows, back and forth; left
    out: the paper's own two orders, with their rules for boundaries and variety. Rows without a score are last."""

    needs = frozenset({Need.CONFIDENCE})

    def __init__(self, *, cycles: int = 4):
        """cycles: how often an epoch goes from one end to the other, 1 (a curriculum) or more."""
        require(cycles >= 1, "order.cycles", cycles, "1 and above")
        self.cycles = cycles

    def rows(self, scores: Scores, *, epoch: int, seed: int) -> Rows:
        ranked = scores.ranked()
        sweeps = [ranked[start :: self.cycles] for start in range(self.cycles)]
        there_and_back = [sweep[::-1] if place % 2 else sweep for place, sweep in enumerate(sweeps)]
        return np.concatenate([*there_and_back, np.flatnonzero(np.isnan(scores.confidence))]).astype(np.int64)
