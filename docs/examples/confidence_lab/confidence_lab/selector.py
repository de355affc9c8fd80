import numpy as np

from sftmix.components import Selector
from sftmix.types import Rows, Scores


class AtLeastTokens(Selector):
    """Responses of at least so many tokens."""

    def __init__(self, *, tokens: int = 8):
        """tokens: the fewest response tokens that are kept."""
        self.tokens = tokens

    def select(self, scores: Scores, *, seed: int) -> Rows:
        return np.flatnonzero(scores.n_tokens >= self.tokens)
