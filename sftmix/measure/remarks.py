"""Remarks on a finished training: one sentence for each thing that its figures should make a user stop at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.steps import read_steps
from sftmix.common.tables import read_dynamics
from sftmix.measure.model import SAMPLE

UNMOVED = 5e-3
"""Relative change of the NLL below which a training is said to have hardly changed the model."""
WORSE = 1e-3
"""Relative rise of the held-out NLL above which a model is said to be worse than its base model."""
LARGE = 1e-3
"""Learning rate from which on a larger one is no advice."""
BETTER = 1e-3
"""Nats per token by which an earlier evaluation must be better before it is worth a sentence."""


DIVERGED = 1.2
"""Ratio of the last losses of a reference to its first ones above which its training did harm."""


def remarks(root: Path, stages: Mapping[str, Mapping[str, Any]], learning_rate: float) -> list[str]:
    """Return the sentences about the trained reference and target of a run; none if nothing is wrong.

    root           run directory
    stages         stage -> its figures
    learning_rate  of the target
    """
    found = list(_reference(stages.get("reference", {})))
    return [*found, *_target(root, stages, learning_rate)] if "train" in stages else found


def ends_of_loss(stage: Path) -> dict[str, float]:
    """Return the loss per token of the first and of the last steps of a stage: a tenth of all, or 8, or half.

    Steps whose loss was not finite are left out; {} with fewer than two others. It is weighted by tokens, because the
    last step of an epoch may hold a single short response.
    """
    steps = read_steps(stage)
    losses = [(line["loss"], line["ntp_tokens"]) for line in steps if line["loss"] is not None and line["ntp_tokens"]]
    size = min(len(losses) // 2, max(8, len(losses) // 10))
    return {"loss_first": _per_token(losses[:size]), "loss_last": _per_token(losses[-size:])} if size else {}


def _per_token(losses: Sequence[tuple[float, int]]) -> float:
    return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)


def _reference(figures: Mapping[str, Any]) -> Iterator[str]:
    first, last = figures.get("loss_first"), figures.get("loss_last")
    if first is not None and last is not None and last > DIVERGED * first:
        yield (
            f"The training of the reference diverged: its loss was {first:.4f} per token in the first steps and "
            f"{last:.4f} in the last, so the confidence says little about the examples. Try a smaller "
            "--training.learning_rate (or --reference.training.learning_rate, if that is set) in another --out."
        )


def _target(root: Path, stages: Mapping[str, Mapping[str, Any]], learning_rate: float) -> list[str]:
    train = stages["train"]
    before, after = stages.get("base", {}).get("eval_nll"), train.get("eval_nll")
    found = [*_skipped(train), *_stopped(train)]
    change, best = _change(root, before, after), train.get("eval_nll_best")
    if train["steps"] and train.get("skipped") == train["steps"]:
        return found
    moved = before is not None and best is not None and abs(best / before - 1) >= UNMOVED
    if change is not None and abs(change) < UNMOVED and not moved:
        found.append(
            f"The training hardly changed the model: {_shown(before, after)} ({train['steps']} steps, learning rate "
            f"{learning_rate:g}). {_more(learning_rate)}"
        )
    elif before is not None and after is not None and after > before * (1 + WORSE):
        found.append(
            f"The trained model is worse than the base model on the held-out rows: {_shown(before, after)}. Try a "
            "smaller --training.learning_rate or fewer --training.epochs."
        )
    return found + list(_best(root, train, best, after))


def _more(learning_rate: float) -> str:
    if learning_rate >= LARGE:
        return "The steps may be too few: try more --training.epochs or rows."
    return (
        "The rate is too small for this model, or the steps are too few: try --training.learning_rate "
        f"{30 * learning_rate:g} or more; models below 100M parameters often need 1e-4 to 1e-3."
    )


def _skipped(train: Mapping[str, Any]) -> Iterator[str]:
    skipped, steps = int(train.get("skipped", 0)), int(train["steps"])
    if skipped and skipped == steps:
        yield (
            f"All {steps} steps were skipped, since their gradients were not finite: the model is the base model. "
            "Lower --training.learning_rate, or look for bad rows."
        )
    elif skipped:
        yield f"{skipped} of {steps} steps were skipped, since their gradients were not finite."


def _stopped(train: Mapping[str, Any]) -> Iterator[str]:
    if train.get("stopped_by"):
        steps = f"step {train['steps']} of {train['total_steps']}"
        yield f"{train['stopped_by']} stopped the training early, after {steps}."


def _best(root: Path, train: Mapping[str, Any], best: float | None, after: float | None) -> Iterator[str]:
    step = train.get("eval_nll_best_step")
    if after is not None and best is not None and after - best > BETTER:
        how = f"sftmix export {root} --best --to DIR writes its model"
        if not train.get("best_kept"):
            how = "a run in another --out with --checkpoint.keep_best true keeps its model"
        yield (
            f"The best evaluation was at step {step} of {train['steps']}: held-out NLL {best:.4f}, {after:.4f} at the "
            f"end; {how}."
        )


def _shown(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "the NLL of a sample of training rows is as before"
    return f"NLL per token {before:.4f} before, {after:.4f} after"


def _change(root: Path, before: float | None, after: float | None) -> float | None:
    """Return the relative change of the NLL by training: of held-out rows or, without these, of the sample."""
    if before is not None and after is not None:
        return after / before - 1
    files = [root / stage / SAMPLE for stage in ("base", "train")]
    if not all(file.exists() for file in files):
        return None
    old, new = (_mean_nll(file) for file in files)
    return new / old - 1 if old else None


def _mean_nll(file: Path) -> float:
    sample = read_dynamics(file)
    return float(np.sum(sample.nll_sum[:, -1]) / np.sum(sample.n_tokens))
