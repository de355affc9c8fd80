"""Training dynamics of a stage: the scores of all examples at C checkpoints, from which a confidence is computed.

`ScoreAtCheckpoints` scores all examples under the weights of a step; `OnlineLosses` takes the loss of each in its own
training step.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sftmix.components.base import Callback, CallbackResult, StageState
from sftmix.disk.tables import read_dynamics, write_dynamics
from sftmix.ranks.world import World
from sftmix.training.scoring import example_nll, gather_nll
from sftmix.types import NOT_COUNTED, OF_TOKENS, Batch, RowLosses, TrainingDynamics
from sftmix.words.errors import BROKEN, ConfigError, NonFiniteError


def checkpoint_steps(checkpoints: int | Sequence[float], total_steps: int) -> list[int]:
    """Return the optimizer steps at which the reference is scored; 0 = before training.

    A number C: evenly spaced, the last at the end; all steps if there are fewer than C. A list: shares of the run if
    none is above 1 (0 before training, 1 its end; a share above 0 is at least step 1), else optimizer steps.
    """
    if isinstance(checkpoints, int):
        # 3 of 8 steps: 3, 5, 8
        return sorted({max(1, round(total_steps * (k + 1) / checkpoints)) for k in range(checkpoints)})
    if max(checkpoints) <= 1:  # also [0, 1], which is the start and the end, not step 1
        # [0, 0.5, 1] of 8 steps: 0, 4, 8
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
    """The scoring of all rows at the given steps; results are kept on disk, and a checkpoint has their hashes.

    Training stops after the last of them: more steps would change nothing.

    alone    also score the responses without their instructions
    seconds  that the scoring took so far
    """

    ids: Sequence[str]
    steps: Sequence[int]
    directory: Path
    world: World
    alone: bool = False
    seconds: float = field(default=0.0, init=False)

    def on_step_end(self, state: StageState, *, resumed: bool = False) -> CallbackResult:
        metrics = {}
        if state.step in self.steps:
            path = self._path(state.step)
            if resumed and self.world.from_main(path.exists):  # other nodes would remember that it is not there
                dynamics = read_dynamics(path)
            else:
                assert state.score is not None
                started = time.perf_counter()
                scores = state.score()  # of N rows, equal on every rank
                alone = state.score(alone=True) if self.alone else None
                dynamics = one_checkpoint(self.ids, state.step, scores, alone)
                self.world.on_main(lambda: write_dynamics(path, dynamics))
                self.seconds += time.perf_counter() - started
            metrics["train_nll"] = float(dynamics.nll_sum.sum() / max(1, dynamics.n_tokens.sum()))
        return CallbackResult(metrics, stop=state.step >= max(self.steps))

    def on_stage_start(self, state: StageState) -> CallbackResult:
        return self.on_step_end(state, resumed=state.step > 0)

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.parquet"

    def dynamics(self) -> TrainingDynamics:
        """Return all checkpoints together, in order."""
        if missing := self.world.from_main(lambda: [step for step in self.steps if not self._path(step).exists()]):
            raise ConfigError(
                f"the reference was stopped by a callback before its checkpoints at steps {missing}: "
                "name checkpoints that it reaches (reference.checkpoints), or take the callback away"
            )
        return merge_dynamics([read_dynamics(self._path(step)) for step in self.steps])


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
    _parts: list[torch.Tensor] = field(default_factory=list)

    def record(self, batches: Sequence[Batch], nll: Sequence[torch.Tensor]) -> None:
        """Keep this rank's micro-batches of a step, each with the NLL [T] of its token rows, on the device."""
        self._parts += map(example_nll, batches, nll)

    def gathered(self) -> dict[str, torch.Tensor]:
        """Return the losses of this epoch so far from all ranks, by row: `row` i64, `nll_sum` f64, `n_tokens` i64."""
        return gather_nll(self._parts, self.world)

    def restore(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Continue in the middle of an epoch with the result of `gathered`; rank 0 keeps it."""
        if arrays and self.world.is_main:
            # As one part of `example_nll`, whose weight is 1; on every rank, `gathered` would count it as often.
            columns = [arrays[name] for name in ("row", "nll_sum", "n_tokens")]
            self._parts = [torch.stack([*columns, torch.ones_like(columns[0])]).to(self.world.device)]

    def end_epoch(self, epoch: int, step: int) -> None:
        """Write the epoch that ends after `step` optimizer steps, if every example had its turn, and start the next.

        An example whose loss was not finite counts as not scored; its step was skipped. Those beside it in one row
        without padding are not finite either.
        """
        losses = {name: column.numpy() for name, column in self.gathered().items()}
        self._parts = []
        if len(losses.get("row", ())) == len(self.ids):  # max_steps may end within an epoch
            n_tokens = losses["n_tokens"]
            scores = RowLosses(losses["nll_sum"], n_tokens, np.full_like(n_tokens, NOT_COUNTED))
            dynamics = one_checkpoint(self.ids, step, scores)
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
    ids: Sequence[str], step: int, scores: RowLosses, alone: RowLosses | None = None
) -> TrainingDynamics:
    """Return one model's scores of the examples (and of their responses alone) as dynamics of a single checkpoint.

    An example whose perplexity is not finite counts as not scored. NonFiniteError if none is finite.
    """
    dynamics = TrainingDynamics(
        ids=ids,
        steps=np.array([step], dtype=np.int64),
        nll_sum=scores.nll_sum[:, None],  # [N] -> [N, 1]
        n_tokens=scores.n_tokens,
        n_correct=scores.n_correct[:, None],
        token_nll=_first_checkpoint(scores.kept.get("token_nll")),
        alone_nll_sum=None if alone is None else alone.nll_sum[:, None],
        alone_token_nll=None if alone is None else _first_checkpoint(alone.kept.get("token_nll")),
        token_entropy=_first_checkpoint(scores.kept.get("entropy")),
        token_margin=_first_checkpoint(scores.kept.get("margin")),
        states=np.stack(scores.kept["states"]) if "states" in scores.kept else None,
    )
    sums = [s.nll_sum for s in (scores, alone) if s is not None]
    with np.errstate(over="ignore"):
        finite = np.all(np.isfinite(np.exp(sums / np.maximum(scores.n_tokens, 1))), axis=0)
    if len(finite) and not finite.any():
        raise NonFiniteError(f"none of {len(finite)} examples has a finite perplexity: {BROKEN}")
    return dynamics.scoring_only(finite)


def _first_checkpoint(of_tokens: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
    return None if of_tokens is None else [values[None, :] for values in of_tokens]  # [n] -> [1, n] each


def merge_dynamics(parts: Sequence[TrainingDynamics]) -> TrainingDynamics:
    """Merge dynamics of the same examples at several checkpoints; scored are the examples that all of them scored."""
    scored = np.all([p.scored for p in parts], axis=0)
    parts = [part.scoring_only(scored) for part in parts]
    first = parts[0]
    joined: dict[str, Any] = {}
    for name in ("steps", "nll_sum", "n_correct", "alone_nll_sum"):
        if getattr(first, name) is not None:
            joined[name] = np.concatenate([getattr(part, name) for part in parts], axis=-1)  # [N, 1] each -> [N, C]
    for name in OF_TOKENS:
        if getattr(first, name) is not None:
            by_example = zip(*(getattr(part, name) for part in parts), strict=True)
            joined[name] = [np.concatenate(each) for each in by_example]  # [1, n] each -> [C, n]
    return replace(first, states=parts[-1].states, **joined)


def describe_dynamics(dynamics: TrainingDynamics) -> str:
    """Describe the dynamics of a reference in one line: the scored steps, and the NLL per token."""
    nll = dynamics.nll_sum.sum(axis=0) / max(1, dynamics.n_tokens.sum())  # [C]
    course = " -> ".join(f"{value:.3f}" for value in nll)
    return f"{int(dynamics.scored.sum()):,} examples scored at steps {dynamics.steps.tolist()}; NLL per token {course}"
