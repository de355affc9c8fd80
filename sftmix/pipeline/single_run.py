"""Single-run SFTMix: the losses of earlier epochs decide the split of an epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from sftmix.batches.order import EpochPairs
from sftmix.common.files import read_json
from sftmix.common.tables import write_dynamics
from sftmix.components.base import ConfidenceEstimator, PairSampler, Splitter
from sftmix.components.confidence import variability
from sftmix.components.contracts import check_confidence, check_pairs, check_split
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.rows import RunRows
from sftmix.pipeline.stages import is_single_run
from sftmix.pipeline.target import order_of_training
from sftmix.training.dynamics import merge
from sftmix.training.online import OnlineLosses
from sftmix.types import Rows, Scores, Split, TrainingDynamics


@dataclass(frozen=True)
class FromOnlineLosses:
    """The splits of single-run SFTMix: losses of earlier epochs decide each; the first epoch has no split.

    table   the examples, without confidence
    window  number of earlier epochs that count; None: all
    """

    losses: OnlineLosses
    window: int | None
    estimator: ConfidenceEstimator
    splitter: Splitter
    pairing: PairSampler
    table: Scores
    seed: int

    def dynamics(self, epoch: int) -> TrainingDynamics:
        """Return the dynamics that decide epoch `epoch`, which is at least 1."""
        first = 0 if self.window is None else max(0, epoch - self.window)
        return merge([self.losses.read(e) for e in range(first, epoch)])

    def pairs(self, *, begun: int | None = None) -> EpochPairs:
        """Return pairs and groups of each epoch.

        begun  number of epochs that the stage with these losses began, after which an arm that trains longer gets
               shuffled singles; None: every epoch is paired
        """

        def alone(epoch: int) -> bool:
            return epoch == 0 or (begun is not None and epoch >= begun)

        @lru_cache(maxsize=2)
        def made(epoch: int) -> tuple[Split, Scores]:
            dynamics = self.dynamics(epoch)
            confidence = check_confidence(self.estimator, self.estimator.estimate(dynamics), dynamics)
            scores = replace(self.table, confidence=confidence, variability=variability(dynamics))
            return check_split(self.splitter, self.splitter.split(scores, seed=self.seed), scores), scores

        def pairs_of(epoch: int) -> Rows | None:
            if alone(epoch):
                return None
            split, scores = made(epoch)
            pairs = self.pairing.pairs(split, scores, epoch=epoch, seed=self.seed)
            return check_pairs(self.pairing, pairs, split, scores)

        return EpochPairs(lambda epoch: None if alone(epoch) else made(epoch)[0], pairs_of, known=False)


def splits_of_single_run(run: RunContext, rows: RunRows) -> FromOnlineLosses | None:
    """Return the source of a single run's splits, epoch by epoch; None for any other run."""
    config, data = run.config, rows.data.train
    if run.pairing is None or not is_single_run(run.config):
        return None
    return FromOnlineLosses(
        losses=OnlineLosses(data.ids, run.directory.path / "train" / "online", run.world),
        window=config.reference.window,
        estimator=config.confidence,
        splitter=config.splitter,
        pairing=run.pairing,
        table=rows.table(),
        seed=config.seed,
    )


def after_single_run(
    run: RunContext, rows: RunRows, single: FromOnlineLosses
) -> tuple[EpochPairs, TrainingDynamics | None]:
    """Return the pairs for the baseline, and write and return the dynamics behind the last split.

    A callback may stop a single run early, and the baseline train on. The dynamics are None if that was in the first
    epoch.
    """
    steps = read_json(run.directory.path / "train" / "figures.json", steps=int)["steps"]
    begun = order_of_training(run, rows, single.pairs()).epoch_of(steps - 1) + 1  # at least 1
    pairs = single.pairs(begun=begun)
    if begun == 1:
        run.say("train: stopped in the first epoch, before there was a split")
        return pairs, None
    last = single.dynamics(begun - 1)
    run.world.on_main(lambda: write_dynamics(run.directory.path / "confidence" / "dynamics.parquet", last))
    return pairs, last
