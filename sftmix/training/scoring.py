"""Scoring: the losses of the current model on rows, in eval mode and without gradients, by all ranks together.

`Scorer` scores every row of a data set, `with_batch_nll` the global batch of the next training step.

Training dynamics are the scores of all examples at C checkpoints: sums and counts, from which any confidence can be
computed afterwards. `ScoreAtCheckpoints` scores all examples under the weights of a step; `OnlineLosses` takes the loss
of each in its own training step.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sftmix.batches.collate import collate, to_device
from sftmix.batches.order import Slot, TokenisedRows
from sftmix.common.errors import BROKEN, ConfigError, NonFiniteError
from sftmix.common.progress import progress_bar
from sftmix.common.tables import read_dynamics, write_dynamics
from sftmix.common.world import World
from sftmix.components.base import Callback, CallbackResult, StageState
from sftmix.training.module import TrainingModule, autocast, unwrap
from sftmix.types import NOT_COUNTED, Batch, BatchNLL, Plan, RowScores, TrainingDynamics

SCORING_TOKENS = 8192
"""Padded tokens per scoring batch on one rank."""
CPU_SCORING_TOKENS = 2048
"""Largest number of padded tokens per scoring batch on a CPU: larger ones leave its caches, and are padded more."""

Column = Any
"""One value for each of B rows: a tensor or an array [B, ...], or a list; the measure decides."""


@dataclass
class Scorer:
    """The scoring of data sets under a (wrapped) module: log-probabilities in float32, sums in float64.

    precision  fp32 or bf16
    token_nll  also keep the NLL of every response token
    progress   the name of the bar; None: no bar
    """

    world: World
    precision: str = "fp32"
    pad_id: int = 0
    token_nll: bool = False
    progress: str | None = None

    def __call__(self, module: nn.Module, data: TokenisedRows) -> RowScores:
        """Return the scores of every row of `data`, in row order."""
        nll_sum, *counts, token_nll = self.columns(module, data, self._scores) if len(data) else [[], [], [], []]
        n_tokens, n_correct = (np.array(column, dtype=np.int64) for column in counts)
        return RowScores(
            np.array(nll_sum, dtype=np.float64), n_tokens, n_correct, token_nll if self.token_nll else None
        )

    def columns(
        self, module: nn.Module, data: TokenisedRows, measure: Callable[[TrainingModule, Batch], Sequence[Column]]
    ) -> list[list[Any]]:
        """Return the columns that `measure` gives for batches of B rows, of all rows, in row order, on every rank.

        Rows are sorted by length and dealt to the ranks batch by batch. Every rank makes the same number of forward
        passes (a collective under FSDP). The results are joined by row, so that none counts twice.
        """
        world, lengths, mine = self.world, data.lengths, dict[int, tuple[Any, ...]]()
        order = np.argsort(-lengths, kind="stable")  # longest first: memory peaks at the start
        budget = CPU_SCORING_TOKENS if world.device.type == "cpu" else SCORING_TOKENS
        batches = []
        while len(order):
            size = max(1, budget // max(1, int(lengths[order[0]])))
            batches.append(order[:size].tolist())
            order = order[size:]
        rounds = range(0, len(batches), world.size)
        with (
            eval_mode(module, world, self.precision) as target,
            progress_bar(self.progress, total=len(rounds), unit=" batches", enabled=world.is_main, leave=False) as bar,
        ):
            for start in rounds:
                # A rank with one batch fewer takes the last one, too.
                rows = batches[min(start + world.rank, len(batches) - 1)]
                units = [(Slot(row, 0.0),) for row in rows]
                batch = collate(units, data, padding_free=target.padding_free, pad_id=self.pad_id)
                measured = measure(target, to_device(batch, world.device))
                on_host = [x.cpu().numpy() if isinstance(x, torch.Tensor) else x for x in measured]
                mine |= zip(rows, zip(*on_host, strict=True), strict=True)
                bar.update()
        by_row = dict[int, Any]()
        for of_rank in world.gather(mine):
            by_row |= of_rank
        return [list(column) for column in zip(*(by_row[row] for row in range(len(data))), strict=True)]

    def _scores(self, module: TrainingModule, batch: Batch) -> list[Column]:
        out = module(batch, scoring_plan(batch), stats=True)
        assert out.correct is not None
        count = torch.bincount(batch.slot, minlength=len(batch.rows))
        token_nll = split_by_row(out.nll.float(), batch) if self.token_nll else [None] * len(batch.rows)
        return [sum_by_row(out.nll, batch), count, sum_by_row(out.correct, batch), token_nll]


@contextmanager
def eval_mode(module: nn.Module, world: World, precision: str) -> Iterator[TrainingModule]:
    """Yield the module inside its wrapping for forward passes without dropout and gradients; then restore its mode."""
    target = unwrap(module)
    was_training = target.training
    target.eval()
    with torch.no_grad(), autocast(module, precision, world.device):
        yield target
    target.train(was_training)


def refuse_nan(scores: RowScores) -> RowScores:
    """Return the scores if none is NaN; else raise NonFiniteError: a mean with NaN has no meaning."""
    bad = np.flatnonzero(np.isnan(scores.nll_sum))
    if len(bad):
        raise NonFiniteError(f"{len(bad)} examples have no finite NLL (rows {bad[:5].tolist()}): {BROKEN}")
    return scores


def held_out_metrics(scores: RowScores) -> dict[str, float]:
    """Return the NLL per response token (nats), token accuracy, and the share of rows whose every token is the argmax.

    The last figure is exact match under greedy decoding: greedy decoding returns the reference answer if and only if
    each of its tokens is the argmax given the tokens before. Raises NonFiniteError if the NLL of a row is NaN.
    """
    refuse_nan(scores)
    tokens = max(int(scores.n_tokens.sum()), 1)
    rows = max(len(scores.n_tokens), 1)
    return {
        "eval_nll": float(scores.nll_sum.sum()) / tokens,
        "eval_accuracy": float(scores.n_correct.sum()) / tokens,
        "eval_exact_match": float((scores.n_correct == scores.n_tokens).sum()) / rows,
    }


def nll_by(scores: RowScores, groups: Sequence[str]) -> dict[str, float]:
    """Return the NLL per response token (nats) of each group of rows.

    groups  the name of each row's group; those without a response token are left out
    """
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    nll, tokens = (np.bincount(place, weights=column) for column in (scores.nll_sum, scores.n_tokens))
    return {str(name): float(nll[k] / tokens[k]) for k, name in enumerate(names) if tokens[k]}


# ------------------------------------------------------------------------------------- of one micro-batch


def scoring_plan(batch: Batch) -> Plan:
    """Return a plan that trains nothing, for a pass that only computes NLLs."""
    weight = torch.zeros_like(batch.labels, dtype=torch.float32)
    return Plan(
        row_weight=weight,
        pairs=batch.pairs[:0],
        pair_weight=weight[:0],
        lam=weight[:0],
        ntp_count=0.0,
        mixup_count=0.0,
        alone=torch.arange(len(weight), device=weight.device),
    )


def sum_by_row(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return f64[B, ...], the sums over the token rows [T, ...] of each example of the batch."""
    sums = values.new_zeros(len(batch.ids), *values.shape[1:], dtype=torch.float64)
    return sums.index_add_(0, batch.slot, values.double())


def split_by_row(values: torch.Tensor, batch: Batch) -> list[np.ndarray]:
    """Return the token rows [T] of each of the B examples of the batch."""
    counts = torch.bincount(batch.slot, minlength=len(batch.rows)).tolist()
    return [part.numpy() for part in torch.split(values.cpu(), counts)]


# ----------------------------------------------------------------------------------- of the global batch


def example_nll(batch: Batch, nll_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the NLL of the examples with their turn in this micro-batch; repeats and fillers have theirs elsewhere.

    These are `row` i64, `nll_sum` f64 and `n_tokens` i64, on the device.
    """
    has_turn, count = batch.ntp_weight > 0, torch.bincount(batch.slot, minlength=len(batch.ids))
    columns = {"row": batch.rows, "nll_sum": sum_by_row(nll_T, batch), "n_tokens": count}
    return {name: column[has_turn] for name, column in columns.items()}


def gather_nll(parts: Sequence[Mapping[str, torch.Tensor]], world: World) -> dict[str, torch.Tensor]:
    """Join what `example_nll` returned on all ranks by row, on the CPU of every rank; empty if no rank has any."""
    mine = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]} if parts else {}
    ranks = [of_rank for of_rank in world.gather(mine) if of_rank]
    if not ranks:
        return {}
    whole = {name: torch.from_numpy(np.concatenate([of_rank[name] for of_rank in ranks])) for name in ranks[0]}
    order = torch.argsort(whole["row"])
    return {name: column[order] for name, column in whole.items()}


def with_batch_nll(
    batches: Sequence[Batch], ids: Sequence[str], module: nn.Module, world: World, precision: str
) -> list[Batch]:
    """Return the micro-batches with the NLL of the whole global batch: one pass without gradients, in eval mode.

    batches  on the host, as the NLL is
    ids      N example ids, by row of the data set
    """
    with eval_mode(module, world, precision) as target:  # each rank has equally many: a forward is a collective
        on_device = [to_device(batch, world.device) for batch in batches]
        parts = [example_nll(batch, target(batch, scoring_plan(batch)).nll) for batch in on_device]
    whole = gather_nll(parts, world)
    rows, nll_sum = whole["row"], whole["nll_sum"].nan_to_num(nan=0.0, posinf=0.0)
    shared = BatchNLL(rows, nll_sum, whole["n_tokens"], [ids[row] for row in rows.tolist()])
    return [replace(batch, batch_nll=shared) for batch in batches]


# -------------------------------------------------------------------------------------- training dynamics


def checkpoint_steps(checkpoints: int | Sequence[float], total_steps: int) -> list[int]:
    """Return the optimizer steps at which the reference is scored; 0 = before training.

    A number C: evenly spaced, the last at the end; all steps if there are fewer than C. A list: shares of the run if
    none is above 1 (0 before training, 1 its end; a share above 0 is at least step 1), else optimizer steps.
    """
    if isinstance(checkpoints, int):
        return sorted({max(1, round(total_steps * (k + 1) / checkpoints)) for k in range(checkpoints)})
    if max(checkpoints) <= 1:
        return sorted({max(round(share * total_steps), 1 if share > 0 else 0) for share in checkpoints})
    for step in checkpoints:
        if step != int(step) or step > total_steps:
            raise ConfigError(
                f"reference.checkpoints names step {step:g}: give whole steps up to {total_steps}, the length of the "
                "reference run, or only shares from 0 to 1"
            )
    return sorted({int(step) for step in checkpoints})


@dataclass(eq=False)
class ScoreAtCheckpoints(Callback):
    """The scoring of all rows at the given steps; results are kept on disk, so that a resumed run scores nothing twice.

    Training stops after the last of them: more steps would change nothing.

    alone    also score the responses without their instructions
    seconds  that the scoring took so far
    """

    ids: Sequence[str]
    steps: Sequence[int]
    directory: Path
    world: World
    alone: bool = False
    seconds: float = 0.0

    def on_step_end(self, state: StageState) -> CallbackResult:
        metrics = {}
        if state.step in self.steps:
            path = self._path(state.step)
            if self.world.share(path.exists()):
                dynamics = read_dynamics(path)
            else:
                assert state.score is not None
                started = time.perf_counter()
                scores = state.score()
                alone = state.score(alone=True) if self.alone else None
                when = f"step {state.step} of the reference" if self.world.is_main else ""
                dynamics = one_checkpoint(self.ids, state.step, scores, alone, when=when)
                self.world.on_main(lambda: write_dynamics(path, dynamics))
                self.seconds += time.perf_counter() - started
            metrics["train_nll"] = float(dynamics.nll_sum.sum() / max(1, dynamics.n_tokens.sum()))
        return CallbackResult(metrics, stop=state.step >= max(self.steps))

    on_stage_start = on_step_end

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.parquet"

    def dynamics(self) -> TrainingDynamics:
        """Return all checkpoints together, in order."""
        missing = [step for step in self.steps if not self._path(step).exists()]
        if missing:
            raise ConfigError(
                f"the reference was stopped by a callback before its checkpoints at steps {missing}: "
                "name checkpoints that it reaches (reference.checkpoints), or take the callback away"
            )
        return merge([read_dynamics(self._path(step)) for step in self.steps])


@dataclass
class OnlineLosses:
    """The NLL of each example in its turn; every finished epoch becomes a dynamics file of one checkpoint.

    This is how Dataset Cartography (arXiv 2009.10795) collects training dynamics: in training mode (dropout and
    perturbations on), under weights that change during the epoch, and without an extra pass over the examples.

    ids        N example ids
    directory  holds `epoch-<3 digits>.parquet`, epochs from 0
    """

    ids: Sequence[str]
    directory: Path
    world: World
    _parts: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def record(self, batches: Sequence[Batch], nll: Sequence[torch.Tensor]) -> None:
        """Keep this rank's micro-batches of a step, each with the NLL [T] of its token rows, on the device."""
        self._parts += map(example_nll, batches, nll)

    def gathered(self) -> dict[str, torch.Tensor]:
        """Return the losses of this epoch so far from all ranks, by row: `row` i64, `nll_sum` f64, `n_tokens` i64."""
        return gather_nll(self._parts, self.world)

    def restore(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Continue in the middle of an epoch with the result of `gathered`; rank 0 keeps it."""
        if arrays and self.world.is_main:
            self._parts = [{name: column.to(self.world.device) for name, column in arrays.items()}]

    def end_epoch(self, epoch: int, step: int) -> None:
        """Write the epoch that ends after `step` optimizer steps, if every example had its turn, and start the next.

        An example whose loss was not finite counts as not scored; its step was skipped. Those beside it in one row
        without padding are not finite either.
        """
        losses, self._parts = {name: column.numpy() for name, column in self.gathered().items()}, []
        if len(losses.get("row", ())) == len(self.ids):
            n_tokens = losses["n_tokens"]
            scores = RowScores(losses["nll_sum"], n_tokens, np.full_like(n_tokens, NOT_COUNTED))
            when = f"epoch {epoch + 1}" if self.world.is_main else ""
            dynamics = one_checkpoint(self.ids, step, scores, when=when)
            self.world.on_main(lambda: write_dynamics(self.path(epoch), dynamics))

    def path(self, epoch: int) -> Path:
        return self.directory / f"epoch-{epoch:03d}.parquet"

    def epochs(self) -> list[int]:
        """Return the epochs that are written, in order."""
        return sorted(int(path.stem.removeprefix("epoch-")) for path in self.directory.glob("epoch-*.parquet"))

    def read(self, epoch: int) -> TrainingDynamics:
        """Return the losses of one finished epoch, in the order of the ids."""
        return read_dynamics(self.path(epoch)).of(self.ids)


def one_checkpoint(
    ids: Sequence[str], step: int, scores: RowScores, alone: RowScores | None = None, *, when: str = ""
) -> TrainingDynamics:
    """Return one model's scores of the examples (and of their responses alone) as dynamics of a single checkpoint.

    An example whose perplexity is not finite counts as not scored, and `when`, if it names the checkpoint, is printed
    with the number of these. NonFiniteError if none is finite.
    """
    dynamics = TrainingDynamics(
        ids=ids,
        steps=np.array([step], dtype=np.int64),
        nll_sum=scores.nll_sum[:, None],
        n_tokens=scores.n_tokens,
        n_correct=scores.n_correct[:, None],
        token_nll=_first_checkpoint(scores),
        alone_nll_sum=None if alone is None else alone.nll_sum[:, None],
        alone_token_nll=None if alone is None else _first_checkpoint(alone),
    )
    sums = [s.nll_sum for s in (scores, alone) if s is not None]
    with np.errstate(over="ignore"):
        finite = np.all(np.isfinite(np.exp(sums / np.maximum(scores.n_tokens, 1))), axis=0)
    if len(finite) and not finite.any():
        raise NonFiniteError(f"none of {len(finite)} examples has a finite perplexity: {BROKEN}")
    lost = np.flatnonzero((scores.n_tokens > 0) & ~finite)
    if when and len(lost):
        names = [ids[row] for row in lost[:5]]
        shown = f"{len(lost)} of {len(ids)} examples have no finite perplexity and count as not scored: {names}"
        print(f"{when}: {shown}", flush=True)
    return dynamics.scoring_only(finite)


def _first_checkpoint(scores: RowScores) -> list[np.ndarray] | None:
    return None if scores.token_nll is None else [nll[None, :] for nll in scores.token_nll]


def merge(parts: Sequence[TrainingDynamics]) -> TrainingDynamics:
    """Merge dynamics of the same examples at several checkpoints; scored are the examples that all of them scored."""
    scored = np.all([p.scored for p in parts], axis=0)
    first, *_ = parts = [part.scoring_only(scored) for part in parts]
    joined: dict[str, Any] = {}
    for name in ("steps", "nll_sum", "n_correct", "alone_nll_sum"):
        if getattr(first, name) is not None:
            joined[name] = np.concatenate([getattr(part, name) for part in parts], axis=-1)
    for name in ("token_nll", "alone_token_nll"):
        if getattr(first, name) is not None:
            by_example = zip(*(getattr(part, name) for part in parts), strict=True)
            joined[name] = [np.concatenate(each) for each in by_example]
    return replace(first, **joined)


def described(dynamics: TrainingDynamics) -> str:
    """Describe the dynamics of a reference in one line: the scored steps, and the NLL per token."""
    nll = dynamics.nll_sum.sum(axis=0) / max(1, dynamics.n_tokens.sum())
    course = " -> ".join(f"{value:.3f}" for value in nll)
    return f"{int(dynamics.scored.sum()):,} examples scored at steps {dynamics.steps.tolist()}; NLL per token {course}"
