"""A pairing that orders the examples by confidence.

Copy it to where `sftmix` is started: `--objective NTP --pairing curriculum.ByConfidence`.
"""

from typing import Literal

import numpy as np

from sftmix.components import Need, PairSampler
from sftmix.components.component import require_one_of
from sftmix.types import UNPAIRED, Rows, Scores, Split

First = Literal["confident", "unconfident"]


class ByConfidence(PairSampler):
    """Curriculum: the examples in the order of their confidence, two neighbours a pair; the same in every epoch.

    Meant for `--objective NTP`, which takes the order alone. The unpaired are placed between the pairs; if the number
    of the others is odd, the last is left out and placed with them.
    """

    needs = frozenset({Need.CONFIDENCE})

    def __init__(self, *, first: First = "confident"):
        """first: the end at which an epoch begins, confident or unconfident."""
        require_one_of("pairing.first", first, First)
        self.first = first

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        ranked = np.array(scores.ranked(), dtype=np.int64)
        ranked = ranked[split.group[ranked] != UNPAIRED]
        pairs = ranked[: len(ranked) // 2 * 2].reshape(-1, 2)
        return pairs if self.first == "confident" else pairs[::-1]
