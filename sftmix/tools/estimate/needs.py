"""The needs of a stage: FLOPs, bytes that ranks send each other, bytes on one device.

FLOPs are multiplications and additions of matrices. A matrix takes 2 per number and token in the forward and 4 in the
backward (2 if it is frozen). The head is multiplied with response tokens alone. Mixup adds no matrix product.
"""

from __future__ import annotations

import torch

from sftmix.components.base import Optimizer
from sftmix.functional.fused import block_rows, default_chunk_size
from sftmix.tools.estimate.machine import FLOAT, HALF, Layout, Machine
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.work import Work
from sftmix.types import Float64

PARTS = ("process", "weights", "optimizer", "gradients", "activations", "loss", "working")


def forward_flops(model: FakeModel, amount: Float64) -> tuple[float, float, float]:
    """FLOPs of the backbone's matrices, of attention, and of the head; the amount is that of `amount_of`.

    Attention is the product for the scores and the one with the values: 2 FLOPs each per number of a head and pair of
    positions, of which the causal mask leaves half.
    """
    (vocabulary, width), (tokens, targets, squares) = model.head_shape, amount.tolist()
    attention = 2.0 * model.attention_width * model.n_layers * squares
    return 2.0 * model.per_token.all * tokens, attention, 2.0 * vocabulary * width * targets


def training_flops(model: FakeModel, amount: Float64, *, recompute: bool) -> float:
    """Forward and backward; recompute (activation checkpointing): the forward of the backbone counts twice."""
    matrices, attention, head = forward_flops(model, amount)
    inputs = matrices + 2 * attention + head
    weights = 2.0 * model.per_token.trained * float(amount[0]) + head * model.head_is_trained
    return (matrices + attention) * (2 if recompute else 1) + head + inputs + weights


def traffic(work: Work, model: FakeModel, layout: Layout) -> tuple[float, float]:
    """Bytes of weights and of gradients that each device sends, and receives, in one optimizer step.

    Ranks form a ring: each passes on (n - 1) / n of a tensor that is gathered or reduced, twice that of an average.
    Each pass through the backbone gathers the decoder layers, and again for the backward; the rest is gathered once per
    micro-batch. The last micro-batch of a step reduces gradients to shards, which copies of the weights then average
    (hsdp; under ddp each rank has a copy). If it has several passes, FSDP sends those of layers that earlier ones left
    with its first pass, and its own with the last.
    """
    copies, ring = layout.copies, (layout.shards - 1) / layout.shards
    weights = 2 * model.layers.all * work.passes + model.outside.all * work.micro_batches
    twice = layout.shards > 1 and work.passes > work.micro_batches > 1
    gradients = model.outside.trained + model.layers.trained * (2 if twice else 1)
    return layout.size * ring * weights, FLOAT * (ring + 2 * (copies - 1) / copies / layout.shards) * gradients


def memory_of(
    work: Work, model: FakeModel, optimizer: Optimizer, layout: Layout, machine: Machine, process: float
) -> dict[str, int]:
    """Bytes of each part on one device, and `peak`, their sum.

    process  bytes that the process has before there is a model

    In a training the largest of three moments counts: the fused loss, the end of the backward, the optimizer's step.
    """
    stored = {"process": process, "weights": model.stored_bytes / layout.shards}
    # FSDP has gathered two layers (one is computed, the next one comes) and what is outside the layers.
    gathered = layout.size * (2 * model.largest_layer.all + model.outside.all) * (layout.shards > 1)
    if work.largest is None:
        return _parts(**stored, working=gathered)
    trained, segments = model.numbers.trained, work.largest.segments
    whole, share, accumulated = FLOAT * trained, FLOAT * trained / layout.shards, work.micro_batches > 1
    # Each rank holds the whole gradients of earlier micro-batches, under FSDP as well. DDP's buckets are never freed.
    before = whole if accumulated or (layout.shards == 1 and layout.copies > 1) else 0.0
    # Autograd sums the gradients of several segments beside them. Activations that are freed meanwhile still count:
    # their pieces have other sizes, which gradients mostly do not fit into.
    summed = layout.size * trained if len(segments) > 1 else 0.0
    saved, layer = model.saved(segments, layout.compute, recompute=work.options.activation_checkpointing)
    # FSDP has the gradient of a layer as it is computed and in the float32 buffer that ranks add up; at the end of the
    # backward also those of what is outside the layers. DDP's gradients are views of its buckets.
    reduced = (layout.size + FLOAT) * (layout.shards > 1)
    layer += gathered + reduced * model.largest_layer.trained
    stored["optimizer"] = optimizer.state_bytes * trained / layout.shards
    loss = _loss(model, len(work.largest.labels), work.options.chunk_size, layout, machine.device)
    moments = [
        _parts(**stored, gradients=before + summed, activations=saved, loss=loss, working=layer),
        _parts(**stored, gradients=whole if accumulated else share, working=layer + reduced * model.outside.trained),
        _parts(**stored, gradients=share, working=share),
    ]
    return max(moments, key=lambda moment: moment["peak"])


def _parts(**sizes: float) -> dict[str, int]:
    parts = {part: round(sizes.get(part, 0.0)) for part in PARTS}
    return {**parts, "peak": sum(parts.values())}


def _loss(model: FakeModel, targets: int, chunk_size: int | None, layout: Layout, device: torch.device) -> float:
    """Bytes of the fused loss at its peak, which is in its forward."""
    vocabulary, width = model.head_shape
    chunk = min(targets, chunk_size or default_chunk_size(vocabulary, device))
    block = min(chunk, block_rows(vocabulary, device)) * vocabulary * FLOAT
    gradients = FLOAT * vocabulary * width * model.head_is_trained + 2 * FLOAT * targets * width
    copy = HALF * vocabulary * width * (layout.compute == "autocast")  # FSDP has gathered the head in bf16
    return gradients + layout.size * chunk * vocabulary + block * (1 if layout.compute == "float32" else 3) + copy
