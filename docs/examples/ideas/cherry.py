"""Cherry rows by IFD (arXiv 2308.12032): only the hardest rows are trained; `--splitter cherry.Cherry --confidence IFD
--reference.response_alone true --objective.ntp_on unconfident --objective.mu 0`."""

import numpy as np

from sftmix.components import Splitter
from sftmix.components.component import require
from sftmix.types import Scores, Split


class Cherry(Splitter):
    """Two groups: `hard`, the share of the rows with the highest IFD below 1, and all others; left out: the brief
    training of the scoring model on clusters, and the time, as the other rows go through the model untrained."""

    def __init__(self, *, share: float = 0.1):
        """share: of the scored rows that are hard, above 0 and below 1."""
        require(0 < share < 1, "splitter.share", share, "above 0 and below 1")
        self.share = share

    def split(self, scores: Scores, *, seed: int) -> Split:
        ranked = scores.ranked()
        helped = [row for row in ranked if scores.confidence[row] > -1]  # the confidence is minus the IFD
        group = np.where(np.isnan(scores.confidence), -1, 0).astype(np.int8)
        group[helped[::-1][: max(1, round(self.share * len(ranked)))]] = 1
        return Split(group=group, names=("other", "hard"))
