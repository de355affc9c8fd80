"""The needs of a stage: FLOPs, bytes that ranks send each other, bytes on one device.

FLOPs are multiplications and additions of matrices. A matrix takes 2 per number and token in the forward and 4 in the
backward (2 if it is frozen). The head is multiplied with response tokens alone. Mixup adds no matrix product.
"""

from __future__ import annotations

from sftmix.components.base import Optimizer
from sftmix.functional.fused import block_rows, default_chunk_size
from sftmix.tools.estimate.machine import FLOAT, HALF, Layout
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.work import Amount, Work

PARTS = ("process", "weights", "optimizer", "gradients", "activations", "loss", "working")


def forward_flops(model: FakeModel, amount: Amount) -> tuple[float, float, float]:
    """FLOPs of the backbone's matrices, of attention, and of the head.

    Attention is the product for the scores and the one with the values: 2 FLOPs each per number of a head and pair of
    positions, of which the causal mask leaves half.
    """
    vocabulary, width = model.head_shape
    attention = 2.0 * model.attention_width * model.n_layers * amount.squares
    return 2.0 * model.per_token.all * amount.tokens, attention, 2.0 * vocabulary * width * amount.targets


def training_flops(model: FakeModel, amount: Amount, *, recompute: bool) -> float:
    """Forward and backward; recompute (activation checkpointing): the forward of the backbone counts twice."""
    matrices, attention, head = forward_flops(model, amount)
    inputs = matrices + 2 * attention + head
    weights = 2.0 * model.per_token.trained * amount.tokens + head * model.head_is_trained
    return (matrices + attention) * (2 if recompute else 1) + head + inputs + weights


def traffic(work: Work, model: FakeModel, layout: Layout) -> tuple[float, float, float]:
    """Bytes that each device sends: of weights and of gradients in one optimizer step, of weights in all scoring.

    Each device receives as many. A pass through the backbone gathers every decoder layer, in training once more for the
    backward; embeddings, norm and head are gathered once per micro-batch.
    Only the last micro-batch of a step sends gradients. They are reduced to shards, which copies of the weights then
    average (hsdp; under ddp each rank has a copy). If that micro-batch has several passes, FSDP sends what earlier ones
    left in a layer with the first pass, and its own gradients with the last.
    """
    around, copies = layout.size * _ring(layout.shards), layout.machine.count / layout.shards
    outside, layers = model.outside, model.layers
    scoring = around * layers.all * work.read.forwards
    if work.largest is None:
        return 0.0, 0.0, scoring
    weights = around * (2 * layers.all * work.passes + outside.all * work.micro_batches)
    twice = layout.is_sharded and work.passes > work.micro_batches > 1
    leaving = outside.trained + layers.trained * (2 if twice else 1)
    return weights, FLOAT * (_ring(layout.shards) + 2 * _ring(copies) / layout.shards) * leaving, scoring


def _ring(ranks: float) -> float:
    """The share of a gathered or reduced tensor that each rank of a ring passes on; an average takes twice that."""
    return (ranks - 1) / ranks


def memory_of(work: Work, model: FakeModel, optimizer: Optimizer, layout: Layout, process: float) -> dict[str, int]:
    """Bytes of each part on one device, and `peak`, their sum.

    process  bytes that the process has before there is a model

    In a training the largest of three moments counts: the fused loss, the end of the backward, the optimizer's step.
    """
    stored = {"process": process, "weights": model.stored_bytes / layout.shards}
    # FSDP has gathered two layers (one is computed, the next one comes) and what is outside the layers.
    gathered = layout.size * (2 * model.largest_layer.all + model.outside.all) * layout.is_sharded
    if work.largest is None:
        return _parts(**stored, working=gathered)
    trained, segments = model.numbers.trained, work.largest.segments
    whole, share = FLOAT * trained, FLOAT * trained / layout.shards
    # Each rank holds the whole gradients of earlier micro-batches, under FSDP as well. DDP's buckets are never freed.
    before = whole if work.accumulated or layout.parallel == "ddp" else 0.0
    # Autograd sums the gradients of several segments beside them. Activations that are freed meanwhile still count:
    # their pieces have other sizes, which gradients mostly do not fit into.
    summed = layout.size * trained if len(segments) > 1 else 0.0
    saved, layer = model.saved(segments, layout.compute, recompute=work.options.activation_checkpointing)
    loss = _loss(model, len(work.largest.labels), work.options.chunk_size, layout)
    # FSDP has the gradient of a layer as it is computed and in the float32 buffer that ranks add up; at the end of the
    # backward also those of what is outside the layers. DDP's gradients are views of its buckets.
    reduced = (layout.size + FLOAT) * layout.is_sharded
    layer += gathered + reduced * model.largest_layer.trained
    vocabulary, width = model.head_shape
    tied = vocabulary * width * (model.is_tied and model.head_is_trained)  # a second gradient of the head
    outside = reduced * model.outside.trained + tied * (layout.size if layout.is_sharded else FLOAT)
    step = 2 * FLOAT * model.largest_tensor if layout.machine.device.type == "cpu" else share
    stored["optimizer"] = optimizer.state_bytes * trained / layout.shards
    moments = [
        _parts(**stored, gradients=before + summed, activations=saved, loss=loss, working=layer),
        _parts(**stored, gradients=whole if work.accumulated else share, working=layer + outside),
        _parts(**stored, gradients=share, working=step),
    ]
    return max(moments, key=lambda moment: moment["peak"])


def _parts(**sizes: float) -> dict[str, int]:
    parts = {part: round(sizes.get(part, 0.0)) for part in PARTS}
    return {**parts, "peak": sum(parts.values())}


def _loss(model: FakeModel, targets: int, chunk_size: int | None, layout: Layout) -> float:
    """Bytes of the fused loss at its peak, which is in its forward."""
    (vocabulary, width), device = model.head_shape, layout.machine.device
    chunk = min(targets, chunk_size or default_chunk_size(vocabulary, device))
    block = min(chunk, block_rows(vocabulary, device)) * vocabulary * FLOAT
    gradients = FLOAT * vocabulary * width * model.head_is_trained + 2 * FLOAT * targets * width
    copy = HALF * vocabulary * width * (layout.compute == "autocast")  # FSDP has gathered the head in bf16
    return gradients + layout.size * chunk * vocabulary + block * (1 if layout.compute == "float32" else 3) + copy
