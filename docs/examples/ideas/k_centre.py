"""Core sets by k-centre (arXiv 1708.00489): rows unlike those that are chosen; `--selector k_centre.KCentre`."""

import numpy as np

from sftmix.components import Need, Selector
from sftmix.components.component import require
from sftmix.types import Rows, Scores


class KCentre(Selector):
    """Each row that is chosen is the one farthest from all that were chosen before it, by the words of question and
    answer; left out: distances between states of the model, and the paper's search that tolerates outliers."""

    needs = frozenset({Need.TEXTS})

    def __init__(self, *, share: float = 0.5):
        """share: of the rows that are kept, above 0 and at most 1."""
        require(0 < share <= 1, "selector.share", share, "above 0 and at most 1")
        self.share = share

    def select(self, scores: Scores, *, seed: int) -> Rows:
        from sklearn.feature_extraction.text import TfidfVectorizer

        by_id = np.argsort(np.array(scores.id))  # the order of the file decides nothing
        words = TfidfVectorizer(token_pattern=r"\S+").fit_transform([" ".join(scores.texts[row]) for row in by_id])
        chosen, nearest = [0], np.full(len(by_id), -1.0)
        while len(chosen) < round(self.share * len(by_id)):
            nearest = np.maximum(nearest, (words @ words[chosen[-1]].T).toarray()[:, 0])
            nearest[chosen] = 2.0
            chosen.append(int(nearest.argmin()))
        return by_id[chosen]
