"""The needs of a stage: FLOPs, and bytes that ranks send each other.

FLOPs are multiplications and additions of matrices. A matrix takes 2 per number and token in the forward and 4 in the
backward (2 if it is frozen). The head is multiplied with response tokens alone. Mixup adds no matrix product.
"""

from __future__ import annotations

from sftmix.tools.estimate.machine import FLOAT, Layout
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.work import Work
from sftmix.types import Float64


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
