"""The micro-batches of a training, found by laying out some of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftmix.batches.collate import length_groups
from sftmix.batches.deal import deal
from sftmix.batches.order import TrainingOrder, Unit
from sftmix.data import EncodedDataset
from sftmix.estimate.machine import Machine
from sftmix.estimate.trace import Segment
from sftmix.model.packing import is_skipping
from sftmix.options import TrainingOptions

SAMPLED_STEPS = 100
"""Steps whose batches are laid out."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Its segments, its response tokens, whether its step has others."""

    segments: tuple[Segment, ...]
    targets: int
    accumulated: bool

    @property
    def slots(self) -> int:
        return sum(one.slots for one in self.segments)


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What the steps of a training are made of.

    largest        the micro-batch with the most token slots, which need the most memory
    micro_batches  of each rank in a step, on average
    passes         through the backbone in a step, on average: one for each segment of a micro-batch
    """

    largest: MicroBatch
    micro_batches: float
    passes: float


def step_batches(
    data: EncodedDataset, order: TrainingOrder, options: TrainingOptions, machine: Machine, attention: str | None
) -> StepBatches:
    """Of some steps spread over the training.

    attention  as model.attention
    """
    one_row, found = is_padding_free(options, machine, attention), list[MicroBatch]()
    counts = list[tuple[int, int]]()
    for step in np.unique(np.linspace(0, order.total_steps - 1, SAMPLED_STEPS).astype(int)).tolist():
        batch, ranks, device = order.batch(step), machine.count, machine.device
        steps = deal(batch, data.lengths, options, ranks=ranks, device=device, padding_free=one_row)
        found += [
            _laid_out(rank, 0 if one_row else one.n_segments, data, len(steps) > 1)
            for one in steps
            for rank in one.ranks
        ]
        counts.append((len(steps), sum(one.n_segments for one in steps)))
    micro_batches, passes = np.mean(counts, axis=0).tolist()
    return StepBatches(max(found, key=lambda batch: (batch.slots, batch.accumulated)), micro_batches, passes)


def is_padding_free(options: TrainingOptions, machine: Machine, attention: str | None) -> bool:
    """Whether a run puts the examples of a micro-batch into one row (where the model is found to bear it)."""
    if options.padding_free == "auto":
        return options.length_groups is None and is_skipping(attention, machine.device)
    return options.padding_free


def _laid_out(units: Sequence[Unit], n_segments: int, data: EncodedDataset, accumulated: bool) -> MicroBatch:
    """n_segments: 0 for all in one row."""
    rows = np.array([slot.row for unit in units for slot in unit])
    lengths, targets = data.lengths[rows].tolist(), int(data.n_targets[rows].sum())
    if not n_segments:
        packed = data.packed or len(lengths) > 1
        return MicroBatch((Segment(1, sum(lengths), "packed" if packed else "full"),), targets, accumulated)
    segments = []
    for group in length_groups(lengths, min(n_segments, len(lengths))):
        inside = {lengths[i] for i in group}
        segments.append(
            Segment(len(group), max(inside), "packed" if data.packed else "full" if len(inside) == 1 else "padded")
        )
    return MicroBatch(tuple(segments), targets, accumulated)
