"""Scoring: every row of a data set under the model as it is, in eval mode, by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from sftmix.batches.collate import TokenisedRows, collate, to_device
from sftmix.batches.order import Slot
from sftmix.common.errors import NonFiniteError
from sftmix.common.progress import progress_bar
from sftmix.common.world import World
from sftmix.training.module import TrainingModule, unwrap
from sftmix.training.parallel import autocast
from sftmix.types import Batch, BatchNLL, Plan, RowScores

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sftmix.training.module import TrainingModule


SCORING_TOKENS = 8192
"""Padded tokens per scoring batch on one rank."""

CPU_SCORING_TOKENS = 2048
"""The same on a CPU, at most: larger batches leave its caches, and are padded more."""


def scoring_tokens(device: torch.device) -> int:
    """Padded tokens per scoring batch on one rank, on that kind of device."""
    return min(SCORING_TOKENS, CPU_SCORING_TOKENS) if device.type == "cpu" else SCORING_TOKENS


# -------------------------------------------------------------------------------------------- scoring


def score_rows(
    module: nn.Module,
    data: TokenisedRows,
    *,
    world: World,
    precision: str = "fp32",
    pad_id: int = 0,
    token_nll: bool = False,
    progress: str | None = None,
) -> RowScores:
    """Score every row of `data` under the model as it is: log-probabilities in float32, sums in float64."""
    measure = partial(_score_batch, token_nll=token_nll)
    columns = forward_rows(module, data, measure, world=world, precision=precision, pad_id=pad_id, progress=progress)
    return refuse_nan(RowScores(*columns))


Column: TypeAlias = Any

Measure: TypeAlias = "Callable[[TrainingModule, Batch], Sequence[Column]]"
"""(module, batch of B rows) -> columns, each a numpy array [B, ...] or a list of B arrays of any length."""


def forward_rows(
    module: nn.Module,
    data: TokenisedRows,
    measure: Measure,
    *,
    world: World,
    precision: str = "fp32",
    pad_id: int = 0,
    progress: str | None = None,
) -> list[Column]:
    """The columns of `measure` for all rows of `data`, in row order, on every rank: forward passes in eval mode only.

    Rows are sorted by length and dealt to the ranks batch by batch; every rank makes the same number of forward passes
    (a collective under FSDP), and the results are joined by row (T24).
    """
    target = unwrap(module)
    was_training = target.training
    target.eval()
    mine: list[tuple[np.ndarray, Sequence[Column]]] = []
    with torch.no_grad(), autocast(module, precision, world.device):
        for rows, counted in _scoring_batches(data.lengths, world, progress):
            units = [(Slot(int(row), 0.0),) for row in rows]
            batch = collate(units, data, padding_free=target.padding_free, pad_id=pad_id)
            columns = measure(target, to_device(batch, world.device))
            if counted:
                mine.append((rows, columns))
    target.train(was_training)
    return _join(world.gather(mine), len(data))


def _scoring_batches(lengths: np.ndarray, world: World, progress: str | None) -> Iterator[tuple[np.ndarray, bool]]:
    """This rank's batches; a rank that has one fewer repeats its last, uncounted."""
    order = np.argsort(-lengths, kind="stable")  # longest first: memory is at its peak at once
    budget = scoring_tokens(world.device)
    cuts, start = [], 0
    while start < len(order):
        size = max(1, budget // max(1, int(lengths[order[start]])))
        cuts.append(order[start : start + size])
        start += size
    rounds = math.ceil(len(cuts) / world.size)
    with progress_bar(progress, total=rounds, unit="batch", enabled=world.is_main, leave=False) as bar:
        for k in range(rounds):
            place = k * world.size + world.rank
            yield (cuts[place], True) if place < len(cuts) else (cuts[-1], False)
            bar.update()


def _score_batch(module: TrainingModule, batch: Batch, *, token_nll: bool) -> list[Column]:
    out = module(batch, scoring_plan(batch), stats=True)
    assert out.correct is not None
    count = torch.bincount(batch.slot, minlength=len(batch.rows))
    columns: list[Column] = [
        sum_by_row(out.nll, batch),
        count.cpu().numpy().astype(np.int64),
        sum_by_row(out.correct, batch).round().astype(np.int64),
    ]
    return [*columns, split_by_row(out.nll.float(), batch)] if token_nll else columns


def sum_by_row(values: torch.Tensor, batch: Batch) -> np.ndarray:
    """f64[B, ...], the sums over the token rows [T, ...] of each example of the batch."""
    return per_slot(batch, values).cpu().numpy()


def split_by_row(values: torch.Tensor, batch: Batch) -> list[np.ndarray]:
    """The token rows [T] of each of the B examples of the batch."""
    counts = torch.bincount(batch.slot, minlength=len(batch.rows)).tolist()
    return [part.numpy() for part in torch.split(values.cpu(), counts)]


def _join(gathered: Sequence[list[tuple[np.ndarray, Sequence[Column]]]], n_rows: int) -> list[Column]:
    parts = [part for of_rank in gathered for part in of_rank]
    rows = np.concatenate([rows for rows, _ in parts])
    order = np.argsort(rows, kind="stable")
    assert np.array_equal(rows[order], np.arange(n_rows)), "a row was measured twice or not at all"
    joined: list[Column] = []
    for pieces in zip(*(columns for _, columns in parts), strict=True):
        if isinstance(pieces[0], np.ndarray):
            joined.append(np.concatenate(pieces)[order])
        else:
            flat = [one for piece in pieces for one in piece]
            joined.append([flat[i] for i in order])
    return joined


def refuse_nan(scores: RowScores) -> RowScores:
    """The scores, if none is NaN; else NonFiniteError (T10)."""
    bad = np.flatnonzero(np.isnan(scores.nll_sum))
    if len(bad):
        raise NonFiniteError(f"{len(bad)} examples have no finite NLL (rows {bad[:5].tolist()}): the model is broken")
    return scores


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
