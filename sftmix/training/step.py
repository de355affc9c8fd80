"""What each loss is divided by, and what is summed of it."""

from __future__ import annotations

from dataclasses import replace

import torch

from sftmix.common.errors import ConfigError
from sftmix.functional import SFTLoss
from sftmix.types import Batch, Plan


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


def step_sums(batch: Batch, plan: Plan, out: SFTLoss) -> torch.Tensor:
    """f64[5] on the device: loss, weighted NLL, Mixup loss (mu left out), trained tokens, aligned token pairs."""
    weight = batch.ntp_weight[batch.slot] if callable(plan.row_weight) else plan.row_weight
    mixed, aligned = (plan.pair_weight * out.mixup).sum(), out.mixup.new_tensor(len(plan.pairs))
    if plan.mixup_row_weight is not None:  # NTP losses in the place of Mixup's
        mixed = mixed + (plan.mixup_row_weight * out.nll).sum()
        aligned = aligned.new_tensor(len(batch.pairs))
    if plan.mu:
        mixed = mixed / plan.mu
    sums = (out.loss, (weight * out.nll).sum(), mixed, torch.count_nonzero(weight), aligned)
    return torch.stack([x.detach().double() for x in sums])
