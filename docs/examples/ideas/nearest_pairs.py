"""C-Mixup (arXiv 2210.05775): partners have similar answers; `--pairing nearest_pairs.NearestPairs`."""

import numpy as np

from sftmix.components import Need, PairSampler
from sftmix.ranks.rng import generator
from sftmix.types import Rows, Scores, Split


class NearestPairs(PairSampler):
    """Each row of one half with one of the other, so that the answers are as near in all as they can be by the words
    they share, or as far; left out: the paper's draws by a kernel. N rows take N² / 4 numbers."""

    needs = frozenset({Need.TEXTS})

    def __init__(self, *, farthest: bool = False):
        """farthest: pair the rows whose answers share the fewest words."""
        self.farthest = farthest

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        from scipy.optimize import linear_sum_assignment
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(token_pattern=r"\S+").fit_transform([answer for _, answer in scores.texts])
        near = (words[split.confident] @ words[split.unconfident].T).toarray()
        ours, theirs = linear_sum_assignment(near, maximize=not self.farthest)
        pairs = np.stack([split.confident[ours], split.unconfident[theirs]], axis=1)
        return generator(seed, "nearest_pairs", epoch).permutation(pairs)
