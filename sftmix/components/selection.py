"""The selection of all examples, which is what the paper trains on; others are in `others.selectors`."""

import numpy as np

from sftmix.components.base import Selector
from sftmix.types import Rows, Scores


class All(Selector):
    """Every example."""

    def select(self, scores: Scores, *, seed: int) -> Rows:
        return np.arange(len(scores))
