"""The micro-batches of one rank, as the options have them dealt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sftmix.batches.collate import TokenisedRows, collate, to_device
from sftmix.batches.deal import MicroStep, micro_steps
from sftmix.batches.length_groups import token_slots
from sftmix.batches.order import Unit
from sftmix.common.world import World
from sftmix.options import DEFAULT_MICRO_BATCH, TrainingOptions
from sftmix.training.module import unwrap
from sftmix.types import Batch, Rows, Split

MOST_GROUPS = 16
"""Length groups of a micro-batch on CPU, at most: what more of them save in padding, their passes cost."""


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
