import numpy as np

from sftmix.components import Order
from sftmix.types import Rows, Scores


class ShortestFirst(Order):
    """Short responses first, in each epoch."""

    def rows(self, scores: Scores, *, epoch: int, seed: int) -> Rows:
        rows = sorted(range(len(scores)), key=lambda row: (scores.n_tokens[row], scores.id[row]))
        return np.array(rows, dtype=np.int64)
