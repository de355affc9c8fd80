"""The micro-batches of one optimizer step, and what must be known of all of them before the first backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from sftmix.attention import check_attention, packing_problem, skips_between_documents
from sftmix.data.batching import MicroStep, TokenisedRows, Unit, collate, micro_steps, to_device, token_slots
from sftmix.errors import ConfigError
from sftmix.functional import SFTLoss
from sftmix.options import DEFAULT_MICRO_BATCH, TrainingOptions
from sftmix.training.distributed import World, autocast, resolve_parallel, unwrap, wrap
from sftmix.training.layers import compile_layers, recompute_activations
from sftmix.training.step import TrainingModule, per_slot, scoring_plan
from sftmix.training.values import Values
from sftmix.types import Batch, BatchNLL, Plan, Rows, Split

MOST_GROUPS = 16
"""Length groups of a micro-batch on CPU, at most: what more of them save in padding, their passes cost."""


def training_module(
    model: PreTrainedModel,
    options: TrainingOptions,
    *,
    precision: str,
    world: World,
    packed: bool = False,
    trains: bool = False,
    values: Values | None = None,
) -> nn.Module:
    """The wrapped module that trains or scores the model, which keeps apart what it is given in one row.

    packed  some examples hold several documents
    trains  gradients are wanted
    values  those of a model on the meta device
    Raises ConfigError where the attention cannot do that, on this device.
    """
    check_attention(model, world.device, trains=trains)
    if trains and options.activation_checkpointing:
        recompute_activations(model)
    if trains and options.compile:
        compile_layers(model)
    parallel = resolve_parallel(options.parallel, world)
    if not trains:  # no buckets for gradients, and no copies of weights that autocast keeps for a backward
        model.requires_grad_(False)
        parallel = "none" if parallel == "ddp" else parallel
    module = wrap(
        TrainingModule(model, chunk_size=options.chunk_size),
        parallel=parallel,
        precision=precision,
        world=world,
        shard_group_size=options.shard_group_size,
        values=values,
    )
    auto, wanted = options.padding_free == "auto", options.padding_free is True
    if auto:
        wanted = options.length_groups is None and skips_between_documents(model, world.device)
    if wanted or packed:
        problem = _packing_problem(module, precision, world, padding_free=wanted)
        if problem is not None:
            if packed or not auto:
                raise ConfigError(problem)
            wanted = False
            if world.is_main:
                print(f"micro-batches are padded, as training.padding_free is auto: {problem}", flush=True)
    unwrap(module).padding_free = wanted
    if isinstance(module, FSDPModule):
        module.reshard()  # what the probe gathered: the optimizer is made of shards
    return module


def _packing_problem(module: nn.Module, precision: str, world: World, *, padding_free: bool) -> str | None:
    """`sftmix.attention.packing_problem` of the wrapped module's model, also where the model fails.

    ConfigError where it fails under FSDP: its forward did not end, so its parameters stay gathered and another forward
    would train what the optimizer does not have.
    """
    with autocast(module, precision, world.device):
        try:
            return unwrap(module).probe(partial(packing_problem, padding_free=padding_free))
        except ConfigError as error:
            if isinstance(module, FSDPModule):
                raise
            return str(error)


def default_length_groups(examples: int, device: torch.device) -> int:
    """One group per two examples of a micro-batch on CPU; one on a GPU, which prefers one large batch."""
    return min(MOST_GROUPS, max(1, examples // 2)) if device.type == "cpu" else 1


def micro_batch_limit(options: TrainingOptions) -> int | None:
    """Examples of a micro-batch, at most; None where only their tokens are limited."""
    default = DEFAULT_MICRO_BATCH if options.micro_batch_tokens is None else None
    return default if options.micro_batch_size is None else options.micro_batch_size


def deal(
    units: Sequence[Unit],
    lengths: Rows,
    options: TrainingOptions,
    *,
    ranks: int,
    device: torch.device,
    padding_free: bool,
) -> list[MicroStep]:
    """A global batch as the options have it dealt to so many ranks with such a device.

    lengths  i64[N], tokens of each row of the data set
    """
    return micro_steps(
        units,
        lengths,
        world_size=ranks,
        micro_batch_size=micro_batch_limit(options),
        micro_batch_tokens=options.micro_batch_tokens,
        max_segments=_most_groups(lengths, options, device),
        padding_free=padding_free,
    )


def _most_groups(lengths: Rows, options: TrainingOptions, device: torch.device) -> int:
    """Length groups of a padded micro-batch, at most."""
    expected = micro_batch_limit(options) or int((options.micro_batch_tokens or 0) // lengths.mean())  # its examples
    return options.length_groups or default_length_groups(expected, device)


def micro_batches(
    units: Sequence[Unit],
    data: TokenisedRows,
    options: TrainingOptions,
    world: World,
    module: nn.Module,
    *,
    split: Split | None,
    pad_id: int,
    padded: bool = False,
) -> list[Batch]:
    """This rank's share of a global batch, as the (wrapped) module is fed, or padded in any case."""
    padding_free = unwrap(module).padding_free and not padded
    made = []
    for step in deal(units, data.lengths, options, ranks=world.size, device=world.device, padding_free=padding_free):
        share, n_segments = step.ranks[world.rank], step.n_segments
        if not isinstance(module, FSDPModule):  # which alone gathers for each segment, on all ranks at once
            n_segments = min(n_segments, sum(map(len, share)))
        made.append(collate(share, data, n_segments=n_segments, padding_free=padding_free, split=split, pad_id=pad_id))
    return [to_device(batch, world.device) for batch in made]


def too_long(lengths: Rows, options: TrainingOptions, *, device: torch.device, padding_free: bool) -> list[str]:
    """What to say of examples and pairs that exceed training.micro_batch_tokens: one sentence, or none.

    lengths       i64[N], tokens of each row of the data set
    padding_free  of the module that is trained; else a pair may be as wide as its longer member
    """
    budget = options.micro_batch_tokens
    if budget is None:
        return []
    longest, n_over = sorted(lengths.tolist())[-2:], int((lengths > budget).sum())
    most = token_slots(longest, _most_groups(lengths, options, device), padding_free=padding_free)
    if most <= budget:
        return []
    return [
        f"{n_over:,} of {len(lengths):,} examples have more tokens than training.micro_batch_tokens ({budget:,}); such "
        "an example, and a pair that needs more together (padding included), gets a micro-batch of its own, of up to "
        f"{longest[-1]:,} and {most:,} tokens"
    ]


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
