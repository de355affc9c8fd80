"""Selectors: which examples are trained on at all (arXiv 2410.05248, section 5.5)."""

from __future__ import annotations

import numpy as np

from sftmix.components.base import Selector
from sftmix.types import Rows, Scores


class All(Selector):
    """Every example."""

    def select(self, scores: Scores, *, seed: int) -> Rows:
        return np.arange(len(scores), dtype=np.int64)
