"""Remarks on a run: sentences about what went wrong, or hardly went at all."""

from collections.abc import Iterator, Mapping
from typing import Any

from sftmix.components.base import Callback

UNMOVED = 5e-3
"""Relative change of the held-out NLL below which a training is said to have hardly changed the model."""
WORSE = 1e-3
"""Relative rise of the held-out NLL above which a model is said to be worse than its base model."""
ROUNDED = 0.1
"""Share of the change of the held-out NLL by which the rounding of the export must move it to be worth a sentence."""
SHOWN = 1e-4
"""The last digit of a held-out NLL that people are shown."""
BETTER = 1e-3
"""Nats per token by which an earlier evaluation must be better before it is worth a sentence."""
DIVERGED = 1.2
"""Ratio of the last losses of a reference to its first ones above which its training did harm."""
TIED = 0.01
"""Share of the examples above which ties at the cut get a remark."""


class Remarks(Callback):
    """Sentences about what went wrong in a run, or hardly went at all, for `remarks` of summary.json."""

    gives = frozenset()

    def on_summary(self, stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return list(remarks(stages))


def remarks(stages: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sentences about split, trained reference and target of a run; none if nothing is wrong.

    stages  stage -> its figures
    """
    yield from _on_split(stages.get("split", {}))
    yield from _on_reference(stages.get("reference", {}))
    if "train" in stages:
        yield from _on_steps(stages["train"])
        yield from _on_held_out_loss(stages["train"], stages.get("base", {}).get("eval_nll"))


def _on_split(split: Mapping[str, Any]) -> Iterator[str]:
    if (tied := split.get("tied", 0)) > TIED:
        yield (
            f"{tied:.0%} of the examples have the same confidence as one on the other side of the cut, so confidence "
            "does not divide them (Median and Quantile order them by id)."
        )

    medians = [group["confidence_median"] for group in split.get("confidence", {}).values() if len(group) > 1]
    # The unpaired have no median here; that of a group without any confidence is None, which has no place in an order.
    if None not in medians and medians != sorted(medians, reverse=True):
        shown = ", ".join(f"{median:.4g}" for median in medians)
        yield (
            f"The groups of the split are not in the order of their confidence (medians {shown}), and the first is "
            "taken for the confident one: a splitter names its groups most confident first."
        )


def _on_reference(reference: Mapping[str, Any]) -> Iterator[str]:
    first, last = reference.get("loss_first"), reference.get("loss_last")
    if first is not None and last > DIVERGED * first:
        yield (
            f"The training of the reference diverged: its loss was {first:.4f} per token in the first steps and "
            f"{last:.4f} in the last, so the confidence says little about the examples. Try a smaller "
            "--training.learning_rate (or --reference.training.learning_rate, if that is set) in another --out."
        )


def _on_steps(train: Mapping[str, Any]) -> Iterator[str]:
    steps = train["steps"]
    if skipped := int(train["skipped"]):
        yield (
            f"{skipped} of {steps} steps were skipped, since their gradients were not finite: if they are many, lower "
            "--training.learning_rate, or look for bad rows."
        )
    if train["stopped_by"]:
        yield f"{train['stopped_by']} stopped the training early, after step {steps} of {train['total_steps']}."


def _on_held_out_loss(train: Mapping[str, Any], before: float | None) -> Iterator[str]:
    """Yield what the held-out NLL says of the training, of the rounding of its weights, and of its best step.

    before  of the base model; None: it is not measured yet, or there are no held-out rows
    """
    steps, after = train["steps"], train.get("eval_nll")
    if not before or after is None or int(train["skipped"]) == steps:
        return
    best = train["eval_nll_best"]
    if max(abs(after / before - 1), abs(best / before - 1)) < UNMOVED:
        yield (
            f"The training hardly changed the model: NLL per token {before:.4f} before, {after:.4f} after {steps} "
            "steps. Try a larger --training.learning_rate (models below 100M parameters often need 1e-4 to 1e-3) or "
            "more --training.epochs."
        )
    elif after > before * (1 + WORSE):
        yield (
            f"The trained model is worse than the base model on the held-out rows: NLL per token {before:.4f} before, "
            f"{after:.4f} after. Try a smaller --training.learning_rate or fewer --training.epochs."
        )
    end = train.get("eval_nll_as_trained") or after  # None: nothing was rounded
    if abs(after - end) > max(ROUNDED * abs(before - after), SHOWN):
        yield (
            f"Rounding the weights for train/model moved the held-out NLL per token from {end:.4f} to {after:.4f} "
            f"({before:.4f} before training). A training in bf16 saw weights rounded to nearest: "
            "--checkpoint.rounding nearest delivers those. After one in fp32 stochastic keeps most, and --model.dtype "
            "float32 all."
        )
    if end - best > BETTER:
        yield (
            f"The best evaluation was at step {train['eval_nll_best_step']} of {steps}: held-out NLL {best:.4f}, "
            f"{end:.4f} at the end; sftmix export RUN --best writes its weights, of a run with --checkpoint.keep_best "
            "true."
        )
