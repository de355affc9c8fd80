"""A cyclic curriculum (arXiv 2605.30334): easy to hard, several times; `--objective NTP --pairing cyclic.Cyclic`."""

import numpy as np

from sftmix.components import Need, PairSampler
from sftmix.components.component import require
from sftmix.types import UNPAIRED, Rows, Scores, Split


class Cyclic(PairSampler):
    """An epoch goes through the ranks of confidence several times, each time through other rows, back and forth; left
    out: the paper's own two orders, with their rules for boundaries and variety. The pairs are neighbours in rank."""

    needs = frozenset({Need.CONFIDENCE})

    def __init__(self, *, cycles: int = 4):
        """cycles: how often an epoch goes from one end to the other, 1 (a curriculum) or more."""
        require(cycles >= 1, "pairing.cycles", cycles, "1 and above")
        self.cycles = cycles

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        ranked = np.array(scores.ranked(), dtype=np.int64)
        ranked = ranked[split.group[ranked] != UNPAIRED]
        pairs = ranked[: len(ranked) // 2 * 2].reshape(-1, 2)
        sweeps = [pairs[start :: self.cycles] for start in range(self.cycles)]
        return np.concatenate([sweep[::-1] if place % 2 else sweep for place, sweep in enumerate(sweeps)])
