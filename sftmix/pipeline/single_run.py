"""Single-run SFTMix: the losses of the epochs before decide the split of an epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from sftmix.batches.order import EpochPairs
from sftmix.common.files import read_json
from sftmix.common.tables import write_dynamics
from sftmix.components.base import (
    ConfidenceEstimator,
    PairSampler,
    Splitter,
    check_confidence,
    check_pairs,
    check_split,
)
from sftmix.components.confidence import variability
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.rows import RunRows
from sftmix.pipeline.target import order_of_training
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


def is_single_run(run: RunContext) -> bool:
    """True where the target's own losses are its confidence: the stages before training are then made during it."""
    uses_confidence = run.pairing is not None and run.config.splitter.needs_confidence
    return uses_confidence and run.config.reference.single_run


def losses_of_single_run(run: RunContext, rows: RunRows) -> FromOnlineLosses | None:
    """The source of the splits of a single run, epoch by epoch; None for any other run."""
    config, data = run.config, rows.data.train
    if run.pairing is None or not is_single_run(run):
        return None
    return FromOnlineLosses(
        losses=OnlineLosses(data.ids, run.directory.path / "train" / "online", run.world),
        window=getattr(config.reference, "window", 1),
        estimator=config.confidence,
        splitter=config.splitter,
        pairing=run.pairing,
        table=rows.table(),
        seed=config.seed,
    )


def after_single_run(
    run: RunContext, rows: RunRows, online: FromOnlineLosses
) -> tuple[EpochPairs, TrainingDynamics | None]:
    """The pairs that the baseline trains on, and the dynamics that divided the last epoch, which are kept.

    A callback may stop a single run in an epoch that the baseline trains beyond; None: it stopped in the first.
    """
    steps = int(read_json(run.directory.path / "train" / "figures.json")["steps"])
    begun = order_of_training(run, rows, online.pairs()).epoch_of(steps - 1) + 1  # at least 1
    pairs = online.pairs(begun=begun)
    if begun == 1:
        run.say("train: stopped in the first epoch, before there was a split")
        return pairs, None
    last = online.dynamics(begun - 1)
    run.world.on_main(lambda: write_dynamics(run.directory.path / "confidence" / "dynamics.parquet", last))
    return pairs, last
