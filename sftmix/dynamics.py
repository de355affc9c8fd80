"""Training dynamics: scoring every example in eval mode, and the callback that does so at C checkpoints.

Perp_c(Y|X) = exp(nll_sum / n_tokens) at checkpoint c (method.md). What is stored are the sums and counts, so that any
confidence can be computed from them afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from sftmix.components.base import Callback, CallbackResult, StageState
from sftmix.data.batching import Slot, TokenisedRows, collate, to_device
from sftmix.errors import ConfigError, NonFiniteError
from sftmix.store import read_dynamics, write_dynamics
from sftmix.training.distributed import World, autocast, unwrap
from sftmix.training.log import progress_bar
from sftmix.types import Plan, RowScores, TrainingDynamics

if TYPE_CHECKING:
    from collections.abc import Iterator

SCORING_TOKENS = 8192
"""Padded tokens per scoring batch on one rank."""


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
    """Score every row of `data` under the model as it is: forward passes in eval mode, without gradients.

    Rows are sorted by length and dealt to the ranks batch by batch; every rank makes the same number of forward passes
    (a collective under FSDP), and the results are joined by row (T24). Log-probabilities are float32, sums float64.
    """
    target = unwrap(module)
    was_training = target.training
    target.eval()
    mine: list[tuple[np.ndarray, ...]] = []
    tokens: dict[int, np.ndarray] = {}
    with torch.no_grad(), autocast(module, precision, world.device):
        for rows, counted in _scoring_batches(data.lengths, world, progress):
            scored = _score_batch(target, data, rows, world, pad_id)
            if counted:
                mine.append((rows, *(column[: len(rows)] for column in scored[:3])))
                if token_nll:
                    tokens |= dict(zip(rows.tolist(), scored[3], strict=True))
    target.train(was_training)
    return _join(world.gather((mine, tokens)), len(data), token_nll)


def _scoring_batches(lengths: np.ndarray, world: World, progress: str | None) -> Iterator[tuple[np.ndarray, bool]]:
    """This rank's batches; a rank that has one fewer repeats its last, uncounted."""
    order = np.argsort(-lengths, kind="stable")  # longest first: memory is at its peak at once
    cuts, start = [], 0
    while start < len(order):
        size = max(1, SCORING_TOKENS // max(1, int(lengths[order[start]])))
        cuts.append(order[start : start + size])
        start += size
    rounds = math.ceil(len(cuts) / world.size)
    with progress_bar(progress, total=rounds, unit="batch", enabled=world.is_main, leave=False) as bar:
        for k in range(rounds):
            place = k * world.size + world.rank
            yield (cuts[place], True) if place < len(cuts) else (cuts[-1], False)
            bar.update()


def _score_batch(
    module: nn.Module, data: TokenisedRows, rows: np.ndarray, world: World, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    units = [(Slot(int(row), 0.0),) for row in rows]
    batch = to_device(collate(units, data, pad_id=pad_id), world.device)
    size = len(batch.labels)
    none = torch.zeros(0, device=world.device)
    plan = Plan(
        row_weight=torch.zeros(size, device=world.device), pairs=batch.pairs, pair_weight=none, lam=none,
        ntp_count=0.0, mixup_count=0.0,
    )  # fmt: skip
    out = module(batch, plan, stats=True)
    per_slot = torch.zeros(len(rows), dtype=torch.float64, device=world.device)
    nll = per_slot.index_add(0, batch.slot, out.nll.double())
    correct = per_slot.index_add(0, batch.slot, out.correct.double())
    count = torch.bincount(batch.slot, minlength=len(rows))
    each = torch.split(out.nll.float().cpu(), count.tolist())
    return (
        nll.cpu().numpy(),
        count.cpu().numpy().astype(np.int64),
        correct.round().long().cpu().numpy(),
        [t.numpy() for t in each],
    )


def _join(gathered: Sequence[tuple[list, dict]], n_rows: int, token_nll: bool) -> RowScores:
    nll, count, correct = np.full(n_rows, np.nan), np.zeros(n_rows, np.int64), np.zeros(n_rows, np.int64)
    tokens: dict[int, np.ndarray] = {}
    for parts, some in gathered:
        tokens |= some
        for rows, part_nll, part_count, part_correct in parts:
            nll[rows], count[rows], correct[rows] = part_nll, part_count, part_correct
    if np.isnan(nll).any():
        bad = np.flatnonzero(np.isnan(nll))
        raise NonFiniteError(f"{len(bad)} examples have no finite NLL (rows {bad[:5].tolist()}): the model is broken")
    return RowScores(nll, count, correct, [tokens[r] for r in range(n_rows)] if token_nll else None)


# ---------------------------------------------------------------------------------------- checkpoints


def checkpoint_steps(checkpoints: int | Sequence[float], total_steps: int) -> list[int]:
    """Optimizer steps at which the reference is scored; 0 = before training.

    A number C: evenly spaced, the last at the end; with fewer steps than C each step is one. A list: shares of the run
    if none is above 1 (0 before training, 1 its end), else optimizer steps.
    """
    if isinstance(checkpoints, int):
        return sorted({max(1, round(total_steps * (k + 1) / checkpoints)) for k in range(checkpoints)})
    if max(checkpoints) <= 1:
        return sorted({round(share * total_steps) for share in checkpoints})
    for step in checkpoints:
        if step != int(step) or step > total_steps:
            raise ConfigError(
                f"reference.checkpoints names step {step:g}: give whole steps up to {total_steps}, the length of the "
                "reference run, or only shares from 0 to 1"
            )
    return sorted({int(step) for step in checkpoints})


class ScoreAtCheckpoints(Callback):
    """Scores all rows at the given steps and keeps each result on disk, so that a resumed run does not score twice.

    alone  the same rows without their instructions, to be scored as well; None: they are not
    """

    def __init__(
        self,
        *,
        ids: Sequence[str],
        steps: Sequence[int],
        directory: Path,
        world: World,
        alone: TokenisedRows | None = None,
    ) -> None:
        self._ids, self._steps, self._directory, self._world = ids, list(steps), directory, world
        self._alone = alone
        self.seconds = 0.0

    def on_stage_start(self, state: StageState) -> CallbackResult | None:
        return self._score_if_due(state)

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        return self._score_if_due(state)

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}.parquet"

    def _score_if_due(self, state: StageState) -> CallbackResult | None:
        if state.step not in self._steps or self._world.share(self._path(state.step).exists()):
            return None
        assert state.score is not None
        started = time.perf_counter()
        scores = state.score()
        alone = None if self._alone is None else state.score(self._alone)
        if self._world.is_main:
            write_dynamics(self._path(state.step), one_checkpoint(self._ids, state.step, scores, alone))
        self._world.barrier()
        self.seconds += time.perf_counter() - started
        return CallbackResult({"train_nll": float(scores.nll_sum.sum() / max(1, scores.n_tokens.sum()))})

    def dynamics(self) -> TrainingDynamics:
        """All checkpoints together, in order."""
        missing = [step for step in self._steps if not self._path(step).exists()]
        if missing:
            raise ConfigError(
                f"the reference was stopped by a callback before its checkpoints at steps {missing}: "
                "name checkpoints that it reaches (reference.checkpoints), or take the callback away"
            )
        return merge([read_dynamics(self._path(step)) for step in self._steps])


def one_checkpoint(
    ids: Sequence[str], step: int, scores: RowScores, alone: RowScores | None = None
) -> TrainingDynamics:
    """One model's scores of the examples (and of their responses alone) as dynamics of a single checkpoint."""
    token_nll = None if scores.token_nll is None else [t[None, :] for t in scores.token_nll]
    return TrainingDynamics(
        ids=ids,
        steps=np.array([step], dtype=np.int64),
        nll_sum=scores.nll_sum[:, None],
        n_tokens=scores.n_tokens,
        n_correct=scores.n_correct[:, None],
        token_nll=token_nll,
        alone_nll_sum=None if alone is None else alone.nll_sum[:, None],
    )


def merge(parts: Sequence[TrainingDynamics]) -> TrainingDynamics:
    """Dynamics of the same examples at several checkpoints, side by side."""
    first = parts[0]
    tokens = None
    if first.token_nll is not None:
        tokens = [np.concatenate([p.token_nll[i] for p in parts if p.token_nll]) for i in range(len(first.ids))]
    columns = [p.alone_nll_sum for p in parts if p.alone_nll_sum is not None]
    alone = np.concatenate(columns, axis=1) if len(columns) == len(parts) else None
    return TrainingDynamics(
        ids=first.ids,
        steps=np.concatenate([p.steps for p in parts]),
        nll_sum=np.concatenate([p.nll_sum for p in parts], axis=1),
        n_tokens=first.n_tokens,
        n_correct=np.concatenate([p.n_correct for p in parts], axis=1),
        token_nll=tokens,
        alone_nll_sum=alone,
    )


def described(dynamics: TrainingDynamics) -> str:
    """One line on what a reference saw: where it scored, and how its NLL per token went."""
    nll = dynamics.nll_sum.sum(axis=0) / max(1, dynamics.n_tokens.sum())
    course = " -> ".join(f"{value:.3f}" for value in nll)
    steps = ", ".join(str(step) for step in dynamics.steps)
    return f"{int(dynamics.scored.sum()):,} examples scored at steps {steps}; NLL per token {course}"
