"""Single-run SFTMix: the losses of the epochs before decide the split of an epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from sftmix.batches.pairs import EpochPairs
from sftmix.components.base import (
    ConfidenceEstimator,
    PairSampler,
    Splitter,
    check_confidence,
    check_pairs,
    check_split,
)
from sftmix.components.confidence import variability
from sftmix.training.dynamics import merge
from sftmix.training.online import OnlineLosses
from sftmix.types import Rows, Scores, Split, TrainingDynamics


@dataclass(frozen=True)
class FromOnlineLosses:
    """Single-run SFTMix: the losses of the epochs before decide the split of an epoch; the first has none.

    table   scores of the examples without confidence
    window  how many of the last epochs count; None: all
    """

    losses: OnlineLosses
    window: int | None
    estimator: ConfidenceEstimator
    splitter: Splitter
    pairing: PairSampler
    table: Scores
    seed: int

    def dynamics(self, epoch: int) -> TrainingDynamics:
        """The dynamics that decide epoch `epoch`, which is at least 1."""
        first = 0 if self.window is None else max(0, epoch - self.window)
        return merge([self.losses.read(e) for e in range(first, epoch)])

    def pairs(self, *, begun: int | None = None) -> EpochPairs:
        """Pairs and groups of each epoch.

        begun  None, or how many epochs the losses' own stage began: those after them are shuffled singles, for an arm
               that trains on where that one was stopped
        """

        def alone(epoch: int) -> bool:
            return epoch == 0 or (begun is not None and epoch >= begun)

        @lru_cache(maxsize=2)
        def made(epoch: int) -> tuple[Split, Scores]:
            dynamics = self.dynamics(epoch)
            confidence = check_confidence(self.estimator.estimate(dynamics), dynamics)
            scores = replace(self.table, confidence=confidence, variability=variability(dynamics))
            return check_split(self.splitter.split(scores, seed=self.seed), scores), scores

        def pairs_of(epoch: int) -> Rows | None:
            if alone(epoch):
                return None
            split, scores = made(epoch)
            return check_pairs(self.pairing.pairs(split, scores, epoch=epoch, seed=self.seed), len(scores))

        return EpochPairs(lambda epoch: None if alone(epoch) else made(epoch)[0], pairs_of, known=False)
