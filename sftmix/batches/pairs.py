"""Groups and pairs of each epoch of a training stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sftmix.components.base import PairSampler
from sftmix.components.contracts import check_pairs
from sftmix.types import Rows, Scores, Split


@dataclass(frozen=True)
class EpochPairs:
    """What a stage trains on, epoch by epoch (from 0).

    split_of  epoch -> the groups, or None
    pairs_of  epoch -> i64[P, 2], or None for shuffled singles
    known     False where an epoch's pairs come to be only when it begins
    """

    split_of: Callable[[int], Split | None]
    pairs_of: Callable[[int], Rows | None]
    known: bool = True


def unpaired() -> EpochPairs:
    """Shuffled singles in every epoch."""
    return EpochPairs(lambda epoch: None, lambda epoch: None)


def fixed(split: Split, scores: Scores, pairing: PairSampler, seed: int) -> EpochPairs:
    """One split for all epochs (the paper's)."""

    def pairs_of(epoch: int) -> Rows:
        return check_pairs(pairing, pairing.pairs(split, scores, epoch=epoch, seed=seed), len(scores))

    return EpochPairs(lambda epoch: split, pairs_of)
