"""The pairs of each epoch and the order of the target's training: of one split, or of a single run's own losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from sftmix.batches.order import TrainingOrder
from sftmix.common.errors import ConfigError
from sftmix.common.steps import read_steps
from sftmix.common.tables import write_dynamics
from sftmix.components.base import PairSampler
from sftmix.components.confidence import variability
from sftmix.components.contracts import check_confidence, check_pairs, check_split
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.identity import is_single_run
from sftmix.pipeline.rows import RunRows
from sftmix.training.dynamics import merge
from sftmix.training.online import OnlineLosses
from sftmix.types import Rows, Scores, Split, TrainingDynamics


@dataclass(frozen=True)
class EpochPairs:
    """The groups and pairs of each epoch of a stage; epochs count from 0.

    divided  epoch -> the groups, and the scores behind them; None: shuffled singles
    known    False if the pairs of an epoch are made only when it begins
    """

    divided: Callable[[int], tuple[Split, Scores] | None]
    pairing: PairSampler | None = None
    seed: int = 0
    known: bool = True

    def split_of(self, epoch: int) -> Split | None:
        divided = self.divided(epoch)
        return None if divided is None else divided[0]

    def pairs_of(self, epoch: int) -> Rows | None:
        """Return i64[P, 2], or None for shuffled singles."""
        divided, pairing = self.divided(epoch), self.pairing
        if divided is None or pairing is None:
            return None
        split, scores = divided
        return check_pairs(pairing, pairing.pairs(split, scores, epoch=epoch, seed=self.seed), split, scores)


def one_split(split: Split, scores: Scores, pairing: PairSampler, seed: int) -> EpochPairs:
    """One split for all epochs (the paper's)."""
    return EpochPairs(lambda epoch: (split, scores), pairing, seed)


def order_of_arm(run: RunContext, rows: RunRows, name: str, scores: Scores, split: Split | None) -> dict[str, Any]:
    """Return what a stage of the training loop needs of the order of `train` or `baseline`, which have the same.

    These are `order`, the global batches; `split_of`, the groups; `online`, the keeper of a single run's losses.
    """
    config, online, pairs = run.config, None, EpochPairs(lambda epoch: None)
    if is_single_run(config):
        losses = _losses(run, rows)
        online, begun = (losses, None) if name == "train" else (None, _epochs_begun(run))
        pairs = _of_single_run(run, rows.table(), losses, begun)
    elif run.pairing is not None and split is not None:
        pairs = one_split(split, scores, run.pairing, config.seed)
    order = TrainingOrder(
        len(rows.data.train), pairs.pairs_of, options=config.training, seed=config.seed, known=pairs.known
    )
    if not pairs.known and len(order.ends) < 2:
        raise ConfigError(
            f"--reference {type(config.reference).__name__} needs a second epoch, which the losses of the "
            f"first decide, but training has {len(order.ends)}: raise training.epochs (or training.max_steps)"
        )
    return {"order": order, "split_of": pairs.split_of, "online": online}


# ------------------------------------- single-run SFTMix: the losses of earlier epochs decide the split of an epoch


def _of_single_run(run: RunContext, table: Scores, losses: OnlineLosses, begun: int | None) -> EpochPairs:
    """Return pairs and groups of each epoch; the first one has none.

    begun  number of epochs that the target's training began, after which a baseline that trains longer gets shuffled
           singles; None: every epoch is paired
    """
    config, end = run.config, begun or math.inf

    @lru_cache(maxsize=2)
    def divide(epoch: int) -> tuple[Split, Scores]:
        dynamics = _dynamics(run, losses, epoch)
        confidence = check_confidence(config.confidence, config.confidence.estimate(dynamics), dynamics)
        scores = replace(table, confidence=confidence, variability=variability(dynamics))
        return check_split(config.splitter, config.splitter.split(scores, seed=config.seed), scores), scores

    return EpochPairs(lambda epoch: divide(epoch) if 0 < epoch < end else None, run.pairing, config.seed, known=False)


def dynamics_of_single_run(run: RunContext, rows: RunRows) -> TrainingDynamics | None:
    """Write and return the dynamics behind the last split; None if a callback stopped the first epoch."""
    begun = _epochs_begun(run)
    if begun == 1:
        run.say("train: stopped in the first epoch, before there was a split")
        return None
    last = _dynamics(run, _losses(run, rows), begun - 1)
    run.world.on_main(lambda: write_dynamics(run.directory.path / "confidence" / "dynamics.parquet", last))
    return last


def _losses(run: RunContext, rows: RunRows) -> OnlineLosses:
    return OnlineLosses(rows.data.train.ids, run.directory.path / "train" / "online", run.world)


def _dynamics(run: RunContext, losses: OnlineLosses, epoch: int) -> TrainingDynamics:
    """Return the dynamics that decide epoch `epoch`, which is at least 1."""
    window = run.config.reference.window  # None: all earlier epochs count
    first = 0 if window is None else max(0, epoch - window)
    return merge([losses.read(e) for e in range(first, epoch)])


def _epochs_begun(run: RunContext) -> int:
    """Return the number of epochs, at least 1, that the finished training began: a callback may have stopped it."""
    return int(read_steps(run.directory.path / "train")[-1]["epoch"]) + 1
