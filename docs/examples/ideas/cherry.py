"""Cherry rows by IFD (arXiv 2308.12032): only the hardest rows are trained; `--selector cherry.Cherry --confidence IFD
--reference.response_alone true --objective NTP`."""

import numpy as np

from sftmix.components import Need, Selector
from sftmix.components.component import require
from sftmix.types import Rows, Scores


class Cherry(Selector):
    """The share of the scored rows with the highest IFD below 1, under a reference that is trained on all rows; left
    out: the brief training of the scoring model on clusters."""

    needs = frozenset({Need.CONFIDENCE})

    def __init__(self, *, share: float = 0.1):
        """share: of the scored rows that are trained, above 0 and below 1."""
        require(0 < share < 1, "selector.share", share, "above 0 and below 1")
        self.share = share

    def select(self, scores: Scores, *, seed: int) -> Rows:
        ranked = scores.ranked()
        helped = [row for row in ranked if scores.confidence[row] > -1]  # the confidence is minus the IFD
        return np.array(helped[::-1][: max(1, round(self.share * len(ranked)))])
