"""Superfiltering (arXiv 2402.00530): a small model chooses the rows; `--selector superfiltering.Superfiltering`."""

import numpy as np

from sftmix.components import Selector
from sftmix.disk.places import place_of
from sftmix.disk.tables import existing_file, read_dynamics
from sftmix.types import Rows, Scores
from sftmix.words.errors import DataError


class Superfiltering(Selector):
    """Of the rows whose IFD under a small model is below 1, the share of all rows with the highest; left out: nothing
    but the run of the small model, `sftmix confidence` with `--reference.response_alone true`."""

    def __init__(self, *, dynamics: str, share: float = 0.1):
        """
        dynamics: the dynamics.parquet of the small model, whose first checkpoint counts.
        share: of the rows that are kept, above 0.
        """
        self.dynamics, self.share = dynamics, share

    def files(self) -> list[str]:
        return [existing_file("selector.dynamics", self.dynamics)]

    def select(self, scores: Scores, *, seed: int) -> Rows:
        found = read_dynamics(place_of(self.dynamics)).of(scores.id)
        if found.alone_nll_sum is None:
            raise DataError(f"selector.dynamics: {self.dynamics} was written without --reference.response_alone true")
        ifd = found.nll_sum[:, 0] / np.where(found.scored, found.alone_nll_sum[:, 0], np.nan)
        ranked = sorted(np.flatnonzero(ifd < 1).tolist(), key=lambda row: (-ifd[row], scores.id[row]))
        return np.array(ranked[: max(1, round(self.share * len(ifd)))])
