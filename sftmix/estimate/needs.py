"""What a stage needs: FLOPs, bytes that ranks send each other, bytes on one device.

FLOPs are multiplications and additions of matrices: 2 per number and token forward, twice that backward (once where
the matrix is frozen), attention as causal, the head on response tokens only. Mixup adds no matrix product.
"""

from __future__ import annotations

import torch

from sftmix.components.base import Optimizer
from sftmix.estimate.machine import FLOAT, HALF, Layout, Machine
from sftmix.estimate.model import FakeModel
from sftmix.estimate.work import Amount, Work
from sftmix.functional.fused import block_rows, default_chunk_size

PARTS = ("process", "weights", "optimizer", "gradients", "activations", "loss", "working")


def forward_flops(model: FakeModel, amount: Amount) -> float:
    return sum(_forward(model, amount))


def training_flops(model: FakeModel, amount: Amount, *, recompute: bool) -> float:
    """Forward and backward; with activation checkpointing the backbone's forward counts twice."""
    matrices, attention, head = _forward(model, amount)
    inputs = matrices + 2 * attention + head
    weights = 2.0 * model.per_token.trained * amount.tokens + head * model.head_is_trained
    return (matrices + attention) * (2 if recompute else 1) + head + inputs + weights


def _forward(model: FakeModel, amount: Amount) -> tuple[float, float, float]:
    """FLOPs of the backbone's matrices, of attention, and of the head.

    Attention: scores and values, 2 FLOPs each per head number and pair of positions; a causal mask leaves half of them.
    """
    vocabulary, width = model.head_shape
    attention = 2.0 * model.attention_width * model.n_layers * amount.squares
    return 2.0 * model.per_token.all * amount.tokens, attention, 2.0 * vocabulary * width * amount.targets


def step_traffic(work: Work, model: FakeModel, layout: Layout, devices: int) -> tuple[float, float]:
    """Bytes of weights and of gradients that each device sends in one optimizer step, and receives as many.

    Each pass through the backbone gathers every decoder layer for the forward and again for the backward; embeddings,
    norm and head stay for both, and for all passes of a micro-batch. Gradients leave in the last micro-batch alone:
    they are reduced to shards, which the copies of the weights average (hsdp; under ddp each rank has a copy). If that
    has several passes, FSDP sends what earlier micro-batches left in a layer with its first and its own with the last.
    """
    whole, outside, copies = model.numbers, model.outside, devices / layout.shards
    gathered = 2 * (whole.all - outside.all) * work.passes + outside.all * work.micro_batches
    twice = layout.is_sharded and work.passes > work.micro_batches > 1
    leaving = outside.trained + (whole.trained - outside.trained) * (2 if twice else 1)
    around = _ring(layout.shards) + 2 * _ring(copies) / layout.shards
    return layout.size * _ring(layout.shards) * gathered, FLOAT * around * leaving


def reading_traffic(model: FakeModel, forwards: float, layout: Layout) -> float:
    """Bytes that each device sends in so many forward passes without gradients: only layers are gathered for each."""
    return layout.size * _ring(layout.shards) * (model.numbers.all - model.outside.all) * forwards


def _ring(ranks: float) -> float:
    """The share of what is gathered or reduced that each rank of a ring passes on; a sum for all takes twice that."""
    return (ranks - 1) / ranks


def memory_of(
    work: Work, model: FakeModel, optimizer: Optimizer, layout: Layout, machine: Machine, process: float
) -> dict[str, int]:
    """Bytes of each part on one device, and `peak`, their sum; process: what it holds before there is a model.

    Of a training the largest of three moments: the fused loss, the end of the backward, the optimizer's step.
    """
    stored = {"process": process, "weights": model.stored_bytes / layout.shards}
    # FSDP's whole weights: two layers (one computes, one comes) and what lies outside the layers.
    gathered = layout.size * (2 * model.largest_layer.all + model.outside.all) * layout.is_sharded
    if work.largest is None:
        return _parts(**stored, working=gathered)
    trained, segments = model.numbers.trained, work.largest.segments
    whole, share = FLOAT * trained, FLOAT * trained / layout.shards
    # Gradients of micro-batches before this one are reduced by none of the wrappings; DDP keeps its buckets.
    before = whole if work.accumulated or layout.parallel == "ddp" else 0.0
    # Until the last segment is through, autograd sums a micro-batch's own beside them. What is freed meanwhile counts
    # as held: pieces of other sizes, which gradients of matrices mostly do not fit into.
    summed = layout.size * trained if len(segments) > 1 else 0.0
    traced = model.saved(segments, layout.compute, recompute=work.options.activation_checkpointing)
    loss = _loss(model, len(work.largest.labels), work.options.chunk_size, machine.device, layout)
    # Ranks that share the weights have the gradient of a layer as it is computed, and in the float32 buffer that they
    # add up; at the end of the backward that of what lies outside the layers, too. DDP's are views of its buckets.
    reduced = (layout.size + FLOAT) * layout.is_sharded
    layer = model.saved_by_a_layer(segments, layout.compute) + gathered + reduced * model.largest_layer.trained
    vocabulary, width = model.head_shape
    tied = vocabulary * width * (model.is_tied and model.head_is_trained)  # a second gradient of the head
    outside = reduced * model.outside.trained + tied * (layout.size if layout.is_sharded else FLOAT)
    step = 2 * FLOAT * model.largest_tensor if machine.is_cpu else share
    stored["optimizer"] = optimizer.state_bytes * trained / layout.shards
    moments = [
        _parts(**stored, gradients=before + summed, activations=traced, loss=loss, working=layer),
        _parts(**stored, gradients=whole if work.accumulated else share, working=layer + outside),
        _parts(**stored, gradients=share, working=step),
    ]
    return max(moments, key=lambda moment: moment["peak"])


def _parts(**sizes: float) -> dict[str, int]:
    parts = {part: round(sizes.get(part, 0.0)) for part in PARTS}
    return {**parts, "peak": sum(parts.values())}


def _loss(model: FakeModel, targets: int, chunk_size: int | None, device: torch.device, layout: Layout) -> float:
    """Bytes of the fused loss inside its forward, where it needs the most."""
    (vocabulary, width), half = model.head_shape, layout.compute != "float32"
    chunk = min(targets, chunk_size or default_chunk_size(vocabulary, device))
    block = min(chunk, block_rows(vocabulary, device)) * vocabulary * FLOAT
    gradients = FLOAT * vocabulary * width * model.head_is_trained + 2 * FLOAT * targets * width
    copy = HALF * vocabulary * width * (layout.compute == "autocast")  # FSDP has gathered it in bf16
    return gradients + layout.size * chunk * vocabulary + block * (3 if half else 1) + copy
