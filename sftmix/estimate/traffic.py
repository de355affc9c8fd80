"""Bytes that ranks send each other, as `sftmix.training.parallel.wrap` has them work together.

A ring of n ranks passes on (n - 1)/n of what is gathered or reduced, and twice that of what all of them are to have the
sum of. Every rank sends so many bytes and receives as many at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

from sftmix.estimate.batches import StepBatches
from sftmix.estimate.layout import FLOAT, Layout
from sftmix.estimate.model import FakeModel


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that each device sends in one optimizer step, and receives as many.

    weights    gathered, in the dtype of the computation (fsdp, hsdp)
    gradients  of what is trained, float32
    """

    weights: float
    gradients: float

    @property
    def all(self) -> float:
        return self.weights + self.gradients


def step_traffic(model: FakeModel, batches: StepBatches, layout: Layout, devices: int) -> Traffic:
    """Of one optimizer step.

    Each pass through the backbone gathers every decoder layer for the forward and again for the backward; embeddings,
    norm and head stay for both, and for all passes of a micro-batch. Gradients leave in the last micro-batch alone:
    they are reduced to shards, which the copies of the weights average (hsdp; under ddp each rank has a copy). If that
    has several passes, FSDP sends what earlier micro-batches left in a layer with its first and its own with the last.
    """
    copies = devices / layout.shards
    gathered = 2 * _inside(model) * batches.passes + model.outside_layers() * batches.micro_batches
    twice = layout.is_sharded and batches.passes > batches.micro_batches > 1
    outside = model.outside_layers(trained=True)
    leaving = outside + (model.trained - outside) * (2 if twice else 1)
    around = _ring(layout.shards) + 2 * _ring(copies) / layout.shards
    return Traffic(layout.size * _ring(layout.shards) * gathered, FLOAT * around * leaving)


def reading_traffic(model: FakeModel, forwards: float, layout: Layout) -> float:
    """Bytes that each device sends in so many forward passes without gradients.

    Only layers are gathered for each: the rest stays from one to the next.
    """
    return layout.size * _ring(layout.shards) * _inside(model) * forwards


def _inside(model: FakeModel) -> int:
    """Numbers of all decoder layers."""
    return model.numbers - model.outside_layers()


def _ring(ranks: float) -> float:
    return (ranks - 1) / ranks
