"""Training dynamics: the scores of all examples at C checkpoints, put side by side.

Perp_c(Y|X) = exp(nll_sum / n_tokens) at checkpoint c. The sums and counts are stored, so that any confidence can be
computed from them afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sftmix.common.errors import BROKEN, ConfigError, NonFiniteError
from sftmix.common.figures import counted
from sftmix.common.tables import read_dynamics, write_dynamics
from sftmix.common.world import World
from sftmix.components.base import Callback, CallbackResult, StageState
from sftmix.types import Int64, RowScores, TrainingDynamics

# ---------------------------------------------------------------------------------------- checkpoints


def checkpoint_steps(checkpoints: int | Sequence[float], total_steps: int) -> list[int]:
    """Return the optimizer steps at which the reference is scored; 0 = before training.

    A number C: evenly spaced, the last at the end; all steps if there are fewer than C. A list: shares of the run if
    none is above 1 (0 before training, 1 its end; a share above 0 is at least step 1), else optimizer steps.
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
    """Return the nearest step, but never 0 for a share above 0: before training, perplexities have another size."""
    return max(round(share * total_steps), 1 if share > 0 else 0)


def checkpoint_notes(checkpoints: int | Sequence[float], total_steps: int) -> list[str]:
    """Return notes for a short run, which cannot place the checkpoints as they were asked for."""
    steps = checkpoint_steps(checkpoints, total_steps)
    if isinstance(checkpoints, int):
        fewer = len(steps) < checkpoints
        are = "is" if total_steps == 1 else "are"
        told = f"{counted(total_steps, 'step')} {are} fewer than {checkpoints} checkpoints: each is one"
        return [told] if fewer else []
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
    """The scoring of all rows at the given steps; results are kept on disk, so that a resumed run scores nothing twice.

    Training stops after the last of them: more steps would change nothing.

    alone  also score the responses without their instructions
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

    def on_stage_start(self, state: StageState) -> CallbackResult:
        return self.on_step_end(state)

    def on_step_end(self, state: StageState) -> CallbackResult:
        return CallbackResult(self._score_if_due(state), stop=state.step >= max(self._steps))

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}.parquet"

    def _score_if_due(self, state: StageState) -> dict[str, float]:
        if state.step not in self._steps:
            return {}
        there = self._world.share(self._path(state.step).exists())
        found = read_dynamics(self._path(state.step)) if there else self._scored(state)
        return {"train_nll": float(found.nll_sum.sum() / max(1, found.n_tokens.sum()))}

    def _scored(self, state: StageState) -> TrainingDynamics:
        """Score all rows under the current model, and keep the result on disk."""
        assert state.score is not None
        started = time.perf_counter()
        scores = state.score()
        alone = state.score(alone=True) if self._alone else None
        found = one_checkpoint(self._ids, state.step, scores, alone)
        self._world.on_main(lambda: write_dynamics(self._path(state.step), found))
        if self._world.is_main:
            tell_lost(found, scores.n_tokens, f"step {state.step} of the reference")
        self.seconds += time.perf_counter() - started
        return found

    def dynamics(self) -> TrainingDynamics:
        """Return all checkpoints together, in order."""
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
    """Return one model's scores of the examples (and of their responses alone) as dynamics of a single checkpoint.

    An example whose perplexity is not finite counts as not scored; NonFiniteError if none is.
    """
    found = TrainingDynamics(
        ids=ids,
        steps=np.array([step], dtype=np.int64),
        nll_sum=scores.nll_sum[:, None],
        n_tokens=scores.n_tokens,
        n_correct=scores.n_correct[:, None],
        token_nll=None if scores.token_nll is None else [t[None, :] for t in scores.token_nll],
        alone_nll_sum=None if alone is None else alone.nll_sum[:, None],
    )
    return found.scoring_only(_finite(found))


def _finite(found: TrainingDynamics) -> npt.NDArray[np.bool_]:
    """Return bool[N], True for examples whose perplexity is finite; raise NonFiniteError if there are none."""
    sums = found.nll_sum if found.alone_nll_sum is None else np.hstack([found.nll_sum, found.alone_nll_sum])
    with np.errstate(over="ignore"):
        finite = np.asarray(np.isfinite(np.exp(sums / np.maximum(found.n_tokens, 1)[:, None])).all(axis=1))
    if len(finite) and not finite.any():
        raise NonFiniteError(f"none of {len(finite)} examples has a finite perplexity: {BROKEN}")
    return finite


def tell_lost(dynamics: TrainingDynamics, n_tokens: Int64, when: str) -> None:
    """Print how many examples with `n_tokens` i64[N] above 0 count as not scored, and the first of them."""
    lost = np.flatnonzero((n_tokens > 0) & ~dynamics.scored)
    if len(lost):
        names = [dynamics.ids[row] for row in lost[:5]]
        of = f"{len(lost)} of {len(n_tokens)} examples"
        print(f"{when}: {of} have no finite perplexity and count as not scored: {names}", flush=True)


def merge(parts: Sequence[TrainingDynamics]) -> TrainingDynamics:
    """Merge dynamics of the same examples at several checkpoints; scored are the examples that all of them scored."""
    scored = np.all([p.scored for p in parts], axis=0)
    parts = [part.scoring_only(scored) for part in parts]
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
    """Describe the dynamics of a reference in one line: the scored steps, and the NLL per token."""
    nll = dynamics.nll_sum.sum(axis=0) / max(1, dynamics.n_tokens.sum())
    course = " -> ".join(f"{value:.3f}" for value in nll)
    steps = ", ".join(str(step) for step in dynamics.steps)
    return f"{int(dynamics.scored.sum()):,} examples scored at steps {steps}; NLL per token {course}"
