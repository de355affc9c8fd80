"""Pairs of each epoch, and the order in which an arm is trained."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from sftmix.batches.order import TrainingOrder
from sftmix.components.base import PairSampler
from sftmix.components.confidence import variability
from sftmix.components.contracts import check_epoch_order, check_pairs, check_split, confidence_of, read_only
from sftmix.config.wants import Wants
from sftmix.disk.files import read_steps
from sftmix.pipeline.context import RunContext
from sftmix.training.dynamics import OnlineLosses, merge_dynamics
from sftmix.types import Rows, Scores, Split, TrainingDynamics
from sftmix.words.errors import DataError


def pairs_by(
    divided: Callable[[int], tuple[Split | None, Scores]], pairing: PairSampler | None, seed: int
) -> Callable[[int], Rows | None]:
    """Return epoch -> its pairs i64[P, 2], or None for shuffled singles.

    divided  epoch, from 0 -> its split, None if it has no pairs, and the scores it was made from
    """

    def pairs_of(epoch: int) -> Rows | None:
        groups, table = divided(epoch)
        if groups is None or pairing is None:
            return None
        split, scores = read_only(groups), read_only(table)  # a sampler of one's own cannot change what others see
        pairs = check_pairs(pairing, pairing.pairs(split, scores, epoch=epoch, seed=seed), split, scores)
        if len(pairs) == 0:
            raise DataError("no pair can be made of the groups of the split; give more rows")
        return pairs

    return pairs_of


def order_of_arm(
    run: RunContext, name: str, scores: Scores, split: Split | None, chosen: Rows | None = None
) -> tuple[TrainingOrder, Callable[[int], Split | None]]:
    """Return the order of `train` or `baseline`, which is the same for both, and epoch -> its split, or None.

    In a single run each epoch is split by the target's losses in earlier epochs; the first epoch has no split.

    chosen  the rows that are trained on; None: all
    """
    config, order = run.config, run.config.order
    single = Wants(run.config).single_run
    # After a callback stopped the target, no losses split later epochs: the baseline has shuffled singles there.
    begun = epochs_begun(run) if single and name == "baseline" else math.inf

    @lru_cache(maxsize=2)  # asked for the pairs of an epoch, and for the groups of each of its steps
    def divided(epoch: int) -> tuple[Split | None, Scores]:
        if not (single and 0 < epoch < begun):
            return split, scores
        dynamics = dynamics_before(run, epoch)  # from the files that the target writes at the end of each epoch
        confidence = confidence_of(config.confidence, dynamics, scores.texts)
        table = replace(scores, confidence=confidence, variability=variability(dynamics))
        return check_split(config.splitter, config.splitter.split(read_only(table), seed=config.seed), table), table

    def divided_of_chosen(epoch: int) -> tuple[Split | None, Scores]:
        groups, table = divided(epoch)
        if chosen is None:
            return groups, table
        return groups and replace(groups, group=groups.group[chosen]), table.take(chosen)

    def singles_of(epoch: int) -> Rows | None:
        if order is None:
            return None
        table = read_only(divided_of_chosen(epoch)[1])
        return check_epoch_order(order, order.rows(table, epoch=epoch, seed=config.seed), len(table))

    made = TrainingOrder(
        len(run.rows.data.train if chosen is None else chosen),
        pairs_by(divided_of_chosen, config.resolved_pairing(), config.seed),
        options=config.training,
        seed=config.seed,
        pairs_known=not single,
        singles_of=singles_of,
        rows=chosen,
    )
    return made, lambda epoch: divided(epoch)[0]


def losses_of(run: RunContext) -> OnlineLosses:
    """Return what records the losses of each epoch while the target trains, and reads them back."""
    return OnlineLosses(run.rows.data.train.ids, run.path / "train" / "online", run.world)


def dynamics_before(run: RunContext, epoch: int) -> TrainingDynamics:
    """Return the training dynamics by which epoch `epoch`, at least 1, is split."""
    # epoch 3: of window 2 epochs 1 and 2, of window null 0, 1 and 2
    window = run.config.reference.window or epoch  # None: all earlier epochs count
    return merge_dynamics([losses_of(run).read(earlier) for earlier in range(max(0, epoch - window), epoch)])


def epochs_begun(run: RunContext) -> int:
    """Return how many epochs, at least 1, the finished training began; a callback may have stopped it early."""
    steps = read_steps(run.path / "train")
    return int(steps[-1]["epoch"]) + 1 if steps else 1
