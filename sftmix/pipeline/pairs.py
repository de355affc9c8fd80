"""The pairs of each epoch and the order of the target's training: of one split, or of a single run's own losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
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
from sftmix.training.dynamics import OnlineLosses, merge
from sftmix.types import Rows, Scores, Split, TrainingDynamics

Divided = Callable[[int], tuple[Split, Scores] | None]
"""Epoch, from 0 -> the groups, and the scores behind them; None: shuffled singles."""


def pairs_by(divided: Divided, pairing: PairSampler | None, seed: int) -> Callable[[int], Rows | None]:
    """Return epoch -> its pairs i64[P, 2], or None for shuffled singles."""

    def pairs_of(epoch: int) -> Rows | None:
        groups = divided(epoch)
        if groups is None or pairing is None:
            return None
        return check_pairs(pairing, pairing.pairs(*groups, epoch=epoch, seed=seed), *groups)

    return pairs_of


def order_of_arm(run: RunContext, name: str, scores: Scores, split: Split | None) -> dict[str, Any]:
    """Return what a stage of the training loop needs of the order of `train` or `baseline`, which have the same.

    These are `order`, the global batches; `split_of`, the groups; `online`, the keeper of a single run's losses.
    """
    config, single, losses = run.config, is_single_run(run.config), _losses(run)
    begun = _epochs_begun(run) if single and name == "baseline" else math.inf
    of_all = None if split is None else (split, scores)
    divided = _of_single_run(run, losses, begun) if single else lambda epoch: of_all
    pairs_of = pairs_by(divided, config.resolved_pairing(), config.seed)
    order = TrainingOrder(
        len(run.rows.data.train), pairs_of, options=config.training, seed=config.seed, known=not single
    )
    if single and len(order.ends) < 2:
        raise ConfigError(
            f"--reference {type(config.reference).__name__} needs a second epoch, which the losses of the "
            f"first decide, but training has {len(order.ends)}: raise training.epochs (or training.max_steps)"
        )
    online = losses if single and name == "train" else None
    return {"order": order, "split_of": lambda epoch: (divided(epoch) or (None,))[0], "online": online}


# ------------------------------------- single-run SFTMix: the losses of earlier epochs decide the split of an epoch


def _of_single_run(run: RunContext, losses: OnlineLosses, begun: float) -> Divided:
    """Return the groups of each epoch; the first one has none.

    begun  number of epochs that the target's training began, after which a baseline that trains longer gets shuffled
           singles; inf: every epoch is paired
    """
    config = run.config

    @lru_cache(maxsize=2)
    def divide(epoch: int) -> tuple[Split, Scores]:
        dynamics = _dynamics(run, losses, epoch)
        confidence = check_confidence(config.confidence, config.confidence.estimate(dynamics), dynamics)
        scores = replace(run.rows.table(), confidence=confidence, variability=variability(dynamics))
        return check_split(config.splitter, config.splitter.split(scores, seed=config.seed), scores), scores

    return lambda epoch: divide(epoch) if 0 < epoch < begun else None


def dynamics_of_single_run(run: RunContext) -> TrainingDynamics | None:
    """Write and return the dynamics behind the last split; None if a callback stopped the first epoch."""
    begun = _epochs_begun(run)
    if begun == 1:
        run.say("train: stopped in the first epoch, before there was a split")
        return None
    last = _dynamics(run, _losses(run), begun - 1)
    run.world.on_main(lambda: write_dynamics(run.directory.path / "confidence" / "dynamics.parquet", last))
    return last


def _losses(run: RunContext) -> OnlineLosses:
    return OnlineLosses(run.rows.data.train.ids, run.directory.path / "train" / "online", run.world)


def _dynamics(run: RunContext, losses: OnlineLosses, epoch: int) -> TrainingDynamics:
    """Return the dynamics that decide epoch `epoch`, which is at least 1."""
    window = run.config.reference.window  # None: all earlier epochs count
    first = 0 if window is None else max(0, epoch - window)
    return merge([losses.read(e) for e in range(first, epoch)])


def _epochs_begun(run: RunContext) -> int:
    """Return the number of epochs, at least 1, that the finished training began: a callback may have stopped it."""
    return int(read_steps(run.directory.path / "train")[-1]["epoch"]) + 1
