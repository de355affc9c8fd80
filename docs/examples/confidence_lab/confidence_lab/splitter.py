import numpy as np

from sftmix.components import Splitter
from sftmix.types import UNPAIRED, Scores, Split


class Thirds(Splitter):
    """The most and the least confident third; what lies between is too close to call and gets NTP alone."""

    def split(self, scores: Scores, *, seed: int) -> Split:
        scored = np.flatnonzero(~np.isnan(scores.confidence)).tolist()
        ranked = sorted(scored, key=lambda row: (-scores.confidence[row], scores.id[row]))
        third = max(1, len(ranked) // 3)
        group = np.full(len(scores), UNPAIRED, dtype=np.int8)
        group[ranked[:third]], group[ranked[-third:]] = 0, 1
        return Split(group=group, names=("top_third", "bottom_third"))
