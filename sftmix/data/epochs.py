"""The order of an epoch: units of slots, and the global batches that they are cut into.

A pure function of (pairs, seed, epoch): any rank can work it out, and a resumed run needs nothing but the step number.

A *unit* is what must stay in one micro-batch: a pair of slots, or a single slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftmix.rng import generator
from sftmix.types import Rows


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in a batch. A repeat of a row that already had its turn in this epoch has `ntp_weight` 0."""

    row: int
    ntp_weight: float = 1.0


Unit = tuple[Slot, ...]


def epoch_units(n_rows: int, pairs: Rows | None, *, epoch: int, seed: int) -> list[Unit]:
    """Units of one epoch, in training order; every row carries NTP loss exactly once.

    pairs: i64[P, 2] from the pair sampler, or None for an epoch of shuffled singles. Rows in no pair are shuffled and
    spread evenly among the pairs, two at a time, so that every global batch but the last is full.
    """
    if pairs is None:
        order = generator(seed, "order", epoch).permutation(n_rows)
        return [(Slot(int(r)),) for r in order]
    seen = np.zeros(n_rows, dtype=bool)
    paired: list[Unit] = []
    for couple in pairs.tolist():
        slots = []
        for row in couple:
            slots.append(Slot(row, 0.0 if seen[row] else 1.0))
            seen[row] = True
        paired.append(tuple(slots))
    singles = np.flatnonzero(~seen)
    singles = singles[generator(seed, "singles", epoch).permutation(len(singles))]
    return _spread(paired, [(Slot(int(r)),) for r in singles])


def _spread(paired: list[Unit], singles: list[Unit]) -> list[Unit]:
    """Merge single units evenly into the pairs, in neighbouring twos; an odd one comes last."""
    odd = [singles.pop()] if len(singles) % 2 else []
    twos = len(singles) // 2
    total = len(paired) + twos
    places = {int((k + 0.5) * total / twos) for k in range(twos)} if twos else set()
    pair_iter, single_iter = iter(paired), iter(singles)
    merged: list[Unit] = []
    for place in range(total):
        merged += itertools.islice(single_iter, 2) if place in places else itertools.islice(pair_iter, 1)
    return merged + odd


def global_batches(units: Sequence[Unit], global_batch_size: int) -> list[list[Unit]]:
    """Cut the epoch into global batches of `global_batch_size` slots; the last may be short."""
    batches: list[list[Unit]] = [[]]
    room = global_batch_size
    for unit in units:
        if len(unit) > room:
            batches.append([])
            room = global_batch_size
        batches[-1].append(unit)
        room -= len(unit)
    return batches if batches[-1] else batches[:-1]
