"""Remarks on a finished training: one sentence for each thing that its figures should make a user stop at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sftmix.common.steps import read_steps

UNMOVED = 5e-3
"""Relative change of the held-out NLL below which a training is said to have hardly changed the model."""
WORSE = 1e-3
"""Relative rise of the held-out NLL above which a model is said to be worse than its base model."""
BETTER = 1e-3
"""Nats per token by which an earlier evaluation must be better before it is worth a sentence."""
DIVERGED = 1.2
"""Ratio of the last losses of a reference to its first ones above which its training did harm."""


def ends_of_loss(stage: Path) -> dict[str, float]:
    """Return the loss per token of the first and of the last steps of a stage: a tenth of all, or 8, or half.

    Steps whose loss was not finite are left out; {} with fewer than two others. It is weighted by tokens, because the
    last step of an epoch may hold a single short response.
    """
    steps = read_steps(stage)
    losses = [(line["loss"], line["ntp_tokens"]) for line in steps if line["loss"] is not None and line["ntp_tokens"]]
    size = min(len(losses) // 2, max(8, len(losses) // 10))
    ends = {"loss_first": losses[:size], "loss_last": losses[-size:]} if size else {}
    return {
        name: sum(loss * tokens for loss, tokens in part) / sum(tokens for _, tokens in part)
        for name, part in ends.items()
    }


def remarks(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the sentences about the trained reference and target of a run; none if nothing is wrong.

    stages  stage -> its figures
    """
    reference = stages.get("reference", {})
    first, last = reference.get("loss_first"), reference.get("loss_last")
    if first is not None and last > DIVERGED * first:
        yield (
            f"The training of the reference diverged: its loss was {first:.4f} per token in the first steps and "
            f"{last:.4f} in the last, so the confidence says little about the examples. Try a smaller "
            "--training.learning_rate (or --reference.training.learning_rate, if that is set) in another --out."
        )
    if "train" not in stages:
        return
    train, before = stages["train"], stages.get("base", {}).get("eval_nll")
    steps, skipped = train["steps"], int(train.get("skipped", 0))
    if skipped:
        yield (
            f"{skipped} of {steps} steps were skipped, since their gradients were not finite: if they are many, lower "
            "--training.learning_rate, or look for bad rows."
        )
    if train.get("stopped_by"):
        yield f"{train['stopped_by']} stopped the training early, after step {steps} of {train['total_steps']}."
    after, best = train.get("eval_nll"), train.get("eval_nll_best")
    if after is None or best is None or skipped == steps:
        return
    if before is not None and max(abs(after / before - 1), abs(best / before - 1)) < UNMOVED:
        yield (
            f"The training hardly changed the model: NLL per token {before:.4f} before, {after:.4f} after {steps} "
            "steps. Try a larger --training.learning_rate (models below 100M parameters often need 1e-4 to 1e-3) or "
            "more --training.epochs."
        )
    elif before is not None and after > before * (1 + WORSE):
        yield (
            f"The trained model is worse than the base model on the held-out rows: NLL per token {before:.4f} before, "
            f"{after:.4f} after. Try a smaller --training.learning_rate or fewer --training.epochs."
        )
    if after - best > BETTER:
        yield (
            f"The best evaluation was at step {train['eval_nll_best_step']} of {steps}: held-out NLL {best:.4f}, "
            f"{after:.4f} at the end; with --checkpoint.keep_best true, sftmix export RUN --best writes its model."
        )
