"""The micro-batches of one optimizer step, and what must be known of all of them before the first backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from sftmix.data.batching import TokenisedRows, Unit, collate, micro_steps, to_device
from sftmix.functional import SFTLoss
from sftmix.options import TrainingOptions
from sftmix.training.distributed import World, autocast, unwrap
from sftmix.training.step import per_slot, scoring_plan
from sftmix.types import Batch, BatchNLL, Plan, Split


def default_length_groups(micro_batch_size: int, device: torch.device) -> int:
    """One group per two examples on CPU; one on a GPU, which prefers one large batch."""
    return min(16, max(1, micro_batch_size // 2)) if device.type == "cpu" else 1


def micro_batches(
    units: Sequence[Unit],
    data: TokenisedRows,
    options: TrainingOptions,
    world: World,
    *,
    split: Split | None,
    pad_id: int,
) -> list[Batch]:
    """This rank's share of a global batch."""
    micro = options.micro_batch_size
    steps = micro_steps(
        units,
        data.lengths,
        world_size=world.size,
        micro_batch_size=micro,
        max_segments=options.length_groups or default_length_groups(micro, world.device),
    )
    made = (collate(s.ranks[world.rank], data, n_segments=s.n_segments, split=split, pad_id=pad_id) for s in steps)
    return [to_device(batch, world.device) for batch in made]


def with_batch_nll(window: Sequence[Batch], module: nn.Module, world: World, precision: str) -> list[Batch]:
    """The same micro-batches with the NLL of the whole global batch: one pass without gradients, in eval mode."""
    target, found = unwrap(module), []
    training = target.training
    target.eval()
    with torch.no_grad(), autocast(module, precision, world.device):
        for batch in window:  # every rank has equally many: a forward is a collective under FSDP
            nll = per_slot(batch, target(batch, scoring_plan(batch)).nll)
            count = torch.bincount(batch.slot, minlength=len(batch.ids))
            own = batch.ntp_weight > 0  # repeats and fillers have their turn elsewhere
            found.append([x[own].cpu().numpy() for x in (batch.rows, nll, count)])
    target.train(training)
    rows, nll_sum, n_tokens = (np.concatenate(parts) for parts in zip(*_flat(world.gather(found)), strict=True))
    order = np.argsort(rows)
    shared = [torch.from_numpy(x[order]).to(world.device) for x in (rows, nll_sum, n_tokens)]
    return [replace(batch, batch_nll=BatchNLL(*shared)) for batch in window]


def _flat(gathered: Sequence[Sequence[Sequence[np.ndarray]]]) -> list[Sequence[np.ndarray]]:
    return [part for rank in gathered for part in rank]


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
