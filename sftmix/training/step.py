"""Model and losses in one forward: the module that DDP and FSDP wrap.

Using the LM head outside the wrapped forward would skip DDP's hooks and see sharded weights under FSDP (T17).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sftmix.errors import ConfigError
from sftmix.functional import SFTLoss, sft_loss
from sftmix.models import Head, head_of
from sftmix.types import Batch, Plan, Segment


class Perturb(Protocol):
    """`Perturbation.embeddings` of one step: seed and step are given."""

    def __call__(self, e: torch.Tensor, mask: torch.Tensor, *, ids: Sequence[str]) -> torch.Tensor: ...


T = TypeVar("T")


class TrainingModule(nn.Module):
    """A causal language model whose forward returns the fused NTP + Mixup loss of one micro-batch.

    padding_free  it is fed all examples of a micro-batch in one row; whoever sets it has asked
                  `sftmix.attention.packing_problem`
    """

    def __init__(self, model: PreTrainedModel, *, chunk_size: int | None = None) -> None:
        super().__init__()
        self.padding_free = False
        self.model: PreTrainedModel = model
        self.head: Head = head_of(model)
        self.chunk_size = chunk_size

    def hidden_states(self, batch: Batch, perturb: Perturb | None = None) -> torch.Tensor:
        """hidden[T, D]: what the LM head receives at the positions that predict the response tokens."""
        decoder = self.model.get_decoder()
        parts, order = [], []
        for segment in batch.segments:
            inputs = {"input_ids": segment.input_ids}
            if perturb is not None:
                inputs = {"inputs_embeds": self._perturbed(batch, segment, perturb)}
            out = decoder(**inputs, **attention_inputs(segment), use_cache=False)
            parts.append(out.last_hidden_state.flatten(0, 1).index_select(0, segment.index))
            order.append(segment.order)
        return torch.cat(parts).index_select(0, torch.argsort(torch.cat(order)))

    def _perturbed(self, batch: Batch, segment: Segment, perturb: Perturb) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()(segment.input_ids)
        ids = [batch.ids[slot] for slot in segment.slots.tolist()]
        if not ids:  # an idle segment
            return embeddings
        if segment.lengths is None:
            return perturb(embeddings, segment.attention_mask, ids=ids)
        examples = embeddings[0].split(segment.lengths)
        padded = pad_sequence(examples, batch_first=True)
        mask = pad_sequence(list(segment.attention_mask[0].split(segment.lengths)), batch_first=True)
        return perturb(padded, mask, ids=ids)[mask.bool()][None]

    def forward(self, batch: Batch, plan: Plan, *, stats: bool = False, perturb: Perturb | None = None) -> SFTLoss:
        """The loss of `plan`, whose weights are already divided by the global counts.

        stats    also count correct tokens and compute the entropy
        perturb  what a training step does to the input embeddings; scoring leaves it out
        """
        return sft_loss(
            self.hidden_states(batch, perturb),
            self.head.weight,
            batch.labels,
            plan.pairs,
            plan.lam,
            row_weight=plan.row_weight,
            pair_weight=plan.pair_weight,
            bias=self.head.bias,
            softcap=self.head.softcap,
            scale=self.head.scale,
            label_smoothing=plan.label_smoothing,
            chunk_size=self.chunk_size,
            stats=stats,
            row_scale=plan.row_scale,
        )

    def read(self, batch: Batch, function: Callable[[torch.Tensor, Head, torch.Tensor], T]) -> T:
        """`function(hidden[T, D], head, labels i64[T])` inside a forward: `wrap` tells FSDP that this is one (T17)."""
        return function(self.hidden_states(batch), self.head, batch.labels)

    def probe(self, function: Callable[[PreTrainedModel], T]) -> T:
        """`function(model)` inside a forward, as `read`; a head that it finds is taken."""
        found = function(self.model)
        if isinstance(found, Head):
            self.head = found
        return found


def attention_inputs(segment: Segment) -> dict[str, torch.Tensor | None]:
    """What tells the backbone who attends to whom: the mask of real tokens, or the positions of packed documents.

    transformers keeps documents apart by their positions only where it is given no mask (T12).
    """
    if segment.position_ids is None:
        return {"attention_mask": segment.attention_mask}
    return {"attention_mask": None, "position_ids": segment.position_ids}


def normalise(plan: Plan, batch: Batch, *, ntp_count: float, mixup_count: float, world_size: int) -> Plan:
    """Divide the plan's weights by the counts of the whole global batch (T1, T2).

    Times the world size, because DDP and FSDP average gradients over ranks. A rule knows nothing of repeated slots, so
    its weights are multiplied with the slots' NTP weights.
    """
    pair_count = ntp_count if plan.mixup_mean == "ntp" else mixup_count
    row_factor = world_size / ntp_count if ntp_count else 0.0
    pair_factor = world_size / pair_count if pair_count else 0.0
    scaled = replace(plan, pair_weight=plan.pair_weight * pair_factor, mixup_row_weight=None)
    if isinstance(plan.row_weight, torch.Tensor):
        row_weight = plan.row_weight * row_factor
        if plan.mixup_row_weight is not None:
            row_weight = row_weight + plan.mixup_row_weight * pair_factor
        return replace(scaled, row_weight=row_weight)
    if plan.mixup_row_weight is not None:
        raise ConfigError("an objective's row_weight is a rule, so it cannot have a mixup_row_weight, too")
    return replace(scaled, row_scale=batch.ntp_weight[batch.slot].double() * row_factor)


def scoring_plan(batch: Batch) -> Plan:
    """A plan that trains nothing: what a pass that only wants NLLs is given."""
    size, device = len(batch.labels), batch.labels.device
    nothing = torch.zeros(0, device=device)
    return Plan(
        row_weight=torch.zeros(size, device=device),
        pairs=batch.pairs[:0],
        pair_weight=nothing,
        lam=nothing,
        ntp_count=0.0,
        mixup_count=0.0,
    )


def per_slot(batch: Batch, values_T: torch.Tensor) -> torch.Tensor:
    """f64[B, ...], sums of token-row values [T, ...] over each slot."""
    sums = values_T.new_zeros(len(batch.ids), *values_T.shape[1:], dtype=torch.float64)
    return sums.index_add_(0, batch.slot, values_T.double())
