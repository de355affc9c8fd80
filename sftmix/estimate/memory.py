"""Bytes on one device at the peak of a stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from sftmix.components.base import Optimizer
from sftmix.estimate.batches import MicroBatch
from sftmix.estimate.layout import FLOAT, HALF, Layout
from sftmix.estimate.machine import Machine
from sftmix.estimate.model import FakeModel
from sftmix.functional.fused import block_rows, default_chunk_size
from sftmix.options import TrainingOptions


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the peak of training; the parts add up to `peak`.

    process      what the interpreter and its libraries hold before there is a model (host memory, CPU only)
    weights      float32 (their shard under FSDP; a 4-bit base as it is)
    optimizer    its state, of what is trained
    gradients    of what is trained; whole, not their shard, while FSDP accumulates micro-batches; and twice while
                 autograd adds up those of several segments
    activations  what autograd keeps of the largest micro-batch
    loss         logits of a chunk and the gradients of head and hidden states
    working      gathered layers, what the backward of a layer makes, temporaries of the optimizer's step
    """

    process: float
    weights: float
    optimizer: float
    gradients: float
    activations: float
    loss: float
    working: float

    @property
    def peak(self) -> float:
        return sum(asdict(self).values())


def training_memory(
    model: FakeModel,
    batch: MicroBatch,
    options: TrainingOptions,
    optimizer: Optimizer,
    layout: Layout,
    machine: Machine,
    *,
    process: float,
) -> Memory:
    """The largest of three moments: the fused loss, the end of the backward, the optimizer's step."""
    whole, share = FLOAT * model.trained, FLOAT * model.trained / layout.shards
    fixed = {
        "process": process,
        "weights": model.stored_bytes / layout.shards,
        "optimizer": optimizer.state_bytes * model.trained / layout.shards,
    }
    # Gradients of micro-batches before this one are reduced by none of the wrappings; DDP keeps its buckets.
    before = whole if batch.accumulated or layout.parallel == "ddp" else 0.0
    # Until the last segment is through, autograd sums a micro-batch's own beside them. What is freed meanwhile counts
    # as held: pieces of other sizes, which gradients of matrices mostly do not fit into.
    summed = layout.size * model.trained if len(batch.segments) > 1 else 0.0
    after = whole if batch.accumulated else share
    traced = model.saved(batch.segments, layout.compute, recompute=options.activation_checkpointing)
    layer = model.saved_by_a_layer(batch.segments, layout.compute) + _gathered(model, layout) + _reduced(model, layout)
    loss = _loss(model, batch.targets, options, machine.device, layout)
    step = 2 * FLOAT * model.largest_tensor if machine.is_cpu else share
    moments = [
        Memory(**fixed, gradients=before + summed, activations=traced, loss=loss, working=layer),
        Memory(**fixed, gradients=after, activations=0.0, loss=0.0, working=layer + _outside(model, layout)),
        Memory(**fixed, gradients=share, activations=0.0, loss=0.0, working=step),
    ]
    return max(moments, key=lambda moment: moment.peak)


def reading_memory(model: FakeModel, layout: Layout, *, process: float) -> Memory:
    """Of a stage that only scores: the weights."""
    weights = model.stored_bytes / layout.shards
    return Memory(process, weights, 0.0, 0.0, 0.0, 0.0, working=_gathered(model, layout))


def _gathered(model: FakeModel, layout: Layout) -> float:
    """FSDP's whole weights: two layers (one computes, one comes) and what lies outside the layers."""
    return layout.size * (2 * model.largest_layer() + model.outside_layers()) * layout.is_sharded


def _reduced(model: FakeModel, layout: Layout) -> float:
    """The gradient of a layer as FSDP computes it, and in the float32 buffer that ranks add up. DDP's gradients are
    views of its buckets."""
    return (layout.size + FLOAT) * model.largest_layer(trained=True) * layout.is_sharded


def _outside(model: FakeModel, layout: Layout) -> float:
    """At the end of the backward: the same of what lies outside the layers, and a tied head's second gradient."""
    reduced = (layout.size + FLOAT) * model.outside_layers(trained=True) * layout.is_sharded
    tied = model.head.weight.numel() * (model.is_tied and model.head_is_trained)
    return reduced + tied * (layout.size if layout.is_sharded else FLOAT)


def _loss(model: FakeModel, targets: int, options: TrainingOptions, device: torch.device, layout: Layout) -> float:
    """Bytes of the fused loss inside its forward, where it needs the most."""
    (vocabulary, width), half = model.head_shape, layout.compute != "float32"
    chunk = min(targets, options.chunk_size or default_chunk_size(vocabulary, device))
    block = min(chunk, block_rows(vocabulary, device)) * vocabulary * FLOAT
    gradients = FLOAT * vocabulary * width * model.head_is_trained + 2 * FLOAT * targets * width
    copy = HALF * vocabulary * width * (layout.compute == "autocast")  # FSDP has gathered it in bf16
    return gradients + layout.size * chunk * vocabulary + block * (3 if half else 1) + copy
