"""Training dynamics: the scores of all examples at C checkpoints, put side by side.

Perp_c(Y|X) = exp(nll_sum / n_tokens) at checkpoint c. The sums and counts are stored, so that any confidence can be
computed from them afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.errors import BROKEN, ConfigError, NonFiniteError
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
        return sorted({max(round(share * total_steps), 1 if share > 0 else 0) for share in checkpoints})
    for step in checkpoints:
        if step != int(step) or step > total_steps:
            raise ConfigError(
                f"reference.checkpoints names step {step:g}: give whole steps up to {total_steps}, the length of the "
                "reference run, or only shares from 0 to 1"
            )
    return sorted({int(step) for step in checkpoints})


def checkpoint_notes(checkpoints: int | Sequence[float], total_steps: int) -> list[str]:
    """Return a note for a short run, which cannot place the checkpoints as they were asked for; else none."""
    steps = checkpoint_steps(checkpoints, total_steps)
    shares = [] if isinstance(checkpoints, int) else sorted(set(checkpoints))
    wanted = checkpoints if isinstance(checkpoints, int) else len(shares)
    raised = [share for share in shares if share > 0 and max(shares) <= 1 and round(share * total_steps) == 0]
    if len(steps) == wanted and not raised:
        return []
    return [
        f"{wanted} checkpoints fall on steps {steps} of {total_steps}: two on the same step are one, and a share of "
        "less than half a step is step 1 (0 is before training, where perplexities have another size)"
    ]


@dataclass(kw_only=True, eq=False)
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

    def on_stage_start(self, state: StageState) -> CallbackResult:
        return self.on_step_end(state)

    def on_step_end(self, state: StageState) -> CallbackResult:
        metrics = {}
        if state.step in self.steps:
            scored = self.world.share(self._path(state.step).exists())
            dynamics = read_dynamics(self._path(state.step)) if scored else self._scored(state)
            metrics["train_nll"] = float(dynamics.nll_sum.sum() / max(1, dynamics.n_tokens.sum()))
        return CallbackResult(metrics, stop=state.step >= max(self.steps))

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.parquet"

    def _scored(self, state: StageState) -> TrainingDynamics:
        """Score all rows under the current model, and keep the result on disk."""
        assert state.score is not None
        started = time.perf_counter()
        scores = state.score()
        alone = state.score(alone=True) if self.alone else None
        dynamics = one_checkpoint(self.ids, state.step, scores, alone)

        def write() -> None:
            write_dynamics(self._path(state.step), dynamics)
            tell_lost(dynamics, scores.n_tokens, f"step {state.step} of the reference")

        self.world.on_main(write)
        self.seconds += time.perf_counter() - started
        return dynamics

    def dynamics(self) -> TrainingDynamics:
        """Return all checkpoints together, in order."""
        missing = [step for step in self.steps if not self._path(step).exists()]
        if missing:
            raise ConfigError(
                f"the reference was stopped by a callback before its checkpoints at steps {missing}: "
                "name checkpoints that it reaches (reference.checkpoints), or take the callback away"
            )
        return merge([read_dynamics(self._path(step)) for step in self.steps])


def one_checkpoint(
    ids: Sequence[str], step: int, scores: RowScores, alone: RowScores | None = None
) -> TrainingDynamics:
    """Return one model's scores of the examples (and of their responses alone) as dynamics of a single checkpoint.

    An example whose perplexity is not finite counts as not scored; NonFiniteError if none is.
    """
    dynamics = TrainingDynamics(
        ids=ids,
        steps=np.array([step], dtype=np.int64),
        nll_sum=scores.nll_sum[:, None],
        n_tokens=scores.n_tokens,
        n_correct=scores.n_correct[:, None],
        token_nll=None if scores.token_nll is None else [t[None, :] for t in scores.token_nll],
        alone_nll_sum=None if alone is None else alone.nll_sum[:, None],
    )
    sums = np.stack([s.nll_sum for s in (scores, alone) if s is not None], axis=1)
    with np.errstate(over="ignore"):
        finite = np.all(np.isfinite(np.exp(sums / np.maximum(scores.n_tokens, 1)[:, None])), axis=1)
    if len(finite) and not finite.any():
        raise NonFiniteError(f"none of {len(finite)} examples has a finite perplexity: {BROKEN}")
    return dynamics.scoring_only(finite)


def tell_lost(dynamics: TrainingDynamics, n_tokens: Int64, when: str) -> None:
    """Print how many examples with `n_tokens` i64[N] above 0 count as not scored, and the first of them."""
    lost = np.flatnonzero((n_tokens > 0) & ~dynamics.scored)
    if len(lost):
        names = [dynamics.ids[row] for row in lost[:5]]
        shown = f"{len(lost)} of {len(n_tokens)} examples have no finite perplexity and count as not scored: {names}"
        print(f"{when}: {shown}", flush=True)


def merge(parts: Sequence[TrainingDynamics]) -> TrainingDynamics:
    """Merge dynamics of the same examples at several checkpoints; scored are the examples that all of them scored."""
    scored = np.all([p.scored for p in parts], axis=0)
    parts = [part.scoring_only(scored) for part in parts]
    first = parts[0]

    def joined(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts], axis=1)

    tokens = None
    if first.token_nll is not None:
        tokens = [np.concatenate([p.token_nll[i] for p in parts if p.token_nll]) for i in range(len(first.ids))]
    return TrainingDynamics(
        ids=first.ids,
        steps=np.concatenate([part.steps for part in parts]),
        nll_sum=joined("nll_sum"),
        n_tokens=first.n_tokens,
        n_correct=joined("n_correct"),
        token_nll=tokens,
        alone_nll_sum=None if any(part.alone_nll_sum is None for part in parts) else joined("alone_nll_sum"),
    )


def described(dynamics: TrainingDynamics) -> str:
    """Describe the dynamics of a reference in one line: the scored steps, and the NLL per token."""
    nll = dynamics.nll_sum.sum(axis=0) / max(1, dynamics.n_tokens.sum())
    course = " -> ".join(f"{value:.3f}" for value in nll)
    steps = ", ".join(str(step) for step in dynamics.steps)
    size = sum(nll.size for nll in dynamics.token_nll or ()) * 2e-6  # float16 on disk
    tokens = f"; {size:.1f} MB of NLLs of tokens" if size else ""
    return f"{int(dynamics.scored.sum()):,} examples scored at steps {steps}; NLL per token {course}{tokens}"
