import numpy as np

from sftmix.components import PairSampler
from sftmix.ranks.rng import generator
from sftmix.types import Rows, Scores, Split


class NearestInLength(PairSampler):
    """Both groups in order of response length, matched rank by rank: as many response tokens mixed as can be."""

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        def by_length(rows: Rows) -> list[int]:
            return sorted(rows.tolist(), key=lambda row: (scores.n_tokens[row], scores.id[row]))

        columns = [by_length(rows) for rows in (split.confident, split.unconfident)]
        count = min(map(len, columns))
        matched = np.array([column[:count] for column in columns], dtype=np.int64).T
        return generator(seed, "nearest_in_length", epoch).permutation(matched.reshape(-1, 2))
