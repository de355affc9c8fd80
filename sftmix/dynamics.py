"""Training dynamics: scoring every example in eval mode, and the callback that does so at C checkpoints.

Perp_c(Y|X) = exp(nll_sum / n_tokens) at checkpoint c (method.md). What is stored are the sums and counts, so that any
confidence can be computed from them afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from sftmix.components.base import Callback, CallbackResult, StageState
from sftmix.data.batching import Slot, TokenisedRows, collate, to_device
from sftmix.errors import ConfigError, NonFiniteError
from sftmix.progress import progress_bar
from sftmix.store import read_dynamics, write_dynamics
from sftmix.training.distributed import World, autocast, unwrap
from sftmix.training.step import per_slot, scoring_plan
from sftmix.types import Batch, RowScores, TrainingDynamics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sftmix.training.step import TrainingModule

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


# ---------------------------------------------------------------------------------------- checkpoints


def checkpoint_steps(checkpoints: int | Sequence[float], total_steps: int) -> list[int]:
    """Optimizer steps at which the reference is scored; 0 = before training.

    A number C: evenly spaced, the last at the end; with fewer steps than C each step is one. A list: shares of the run
    if none is above 1 (0 before training, 1 its end; a share above 0 is at least step 1), else optimizer steps.
    """
    if isinstance(checkpoints, int):
        return sorted({max(1, round(total_steps * (k + 1) / checkpoints)) for k in range(checkpoints)})
    if max(checkpoints) <= 1:
        return sorted({_step_of_share(share, total_steps) for share in checkpoints})
    for step in checkpoints:
        if step != int(step) or step > total_steps:
            raise ConfigError(
                f"reference.checkpoints names step {step:g}: give whole steps up to {total_steps}, the length of the "
                "reference run, or only shares from 0 to 1"
            )
    return sorted({int(step) for step in checkpoints})


def _step_of_share(share: float, total_steps: int) -> int:
    """The nearest step, but never 0 for a share above 0: before training, perplexities are of another size."""
    return max(round(share * total_steps), 1 if share > 0 else 0)


def checkpoint_notes(checkpoints: int | Sequence[float], total_steps: int) -> list[str]:
    """What to say of `checkpoint_steps` where a short run cannot place the checkpoints as they were asked for."""
    steps = checkpoint_steps(checkpoints, total_steps)
    if isinstance(checkpoints, int):
        fewer = len(steps) < checkpoints
        return [f"{total_steps} steps are fewer than {checkpoints} checkpoints: each is one"] if fewer else []
    if max(checkpoints) > 1:
        return []
    raised = [f"{share:g}" for share in checkpoints if share > 0 and round(share * total_steps) == 0]
    notes = []
    if raised:
        notes.append(
            f"checkpoint {', '.join(raised)} of {total_steps} steps is less than half a step: it is step 1, since step "
            "0 is before training (give 0 for that)"
        )
    if len(steps) < len(set(checkpoints)):
        notes.append(f"{len(set(checkpoints))} checkpoints fall on {len(steps)} of {total_steps} steps: {steps}")
    return notes


class ScoreAtCheckpoints(Callback):
    """Scores all rows at the given steps and keeps each result on disk, so that a resumed run does not score twice.

    Training beyond the last of them would change nothing: it stops there.

    alone  the responses without their instructions are scored, too
    """

    def __init__(
        self,
        *,
        ids: Sequence[str],
        steps: Sequence[int],
        directory: Path,
        world: World,
        alone: bool = False,
    ) -> None:
        self._ids, self._steps, self._directory, self._world = ids, list(steps), directory, world
        self._alone = alone
        self.seconds = 0.0

    def on_stage_start(self, state: StageState) -> CallbackResult | None:
        return self._score_and_stop(state)

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        return self._score_and_stop(state)

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}.parquet"

    def _score_and_stop(self, state: StageState) -> CallbackResult:
        return CallbackResult(self._score_if_due(state), stop=state.step >= max(self._steps))

    def _score_if_due(self, state: StageState) -> dict[str, float]:
        if state.step not in self._steps or self._world.share(self._path(state.step).exists()):
            return {}
        assert state.score is not None
        started = time.perf_counter()
        scores = state.score()
        alone = state.score(alone=True) if self._alone else None
        if self._world.is_main:
            write_dynamics(self._path(state.step), one_checkpoint(self._ids, state.step, scores, alone))
        self._world.barrier()
        self.seconds += time.perf_counter() - started
        return {"train_nll": float(scores.nll_sum.sum() / max(1, scores.n_tokens.sum()))}

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
    """Dynamics of the same examples at several checkpoints, side by side; scored is what is scored at all of them."""
    first = parts[0]
    tokens = None
    if first.token_nll is not None:
        tokens = [np.concatenate([p.token_nll[i] for p in parts if p.token_nll]) for i in range(len(first.ids))]
    columns = [p.alone_nll_sum for p in parts if p.alone_nll_sum is not None]
    alone = np.concatenate(columns, axis=1) if len(columns) == len(parts) else None
    scored = np.all([p.scored for p in parts], axis=0)
    return TrainingDynamics(
        ids=first.ids,
        steps=np.concatenate([p.steps for p in parts]),
        nll_sum=np.concatenate([p.nll_sum for p in parts], axis=1),
        n_tokens=np.where(scored, first.n_tokens, 0),
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
