"""summary.json: the results of a finished run, gathered from the figures of its stages, and remarks on them."""

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import sftmix
from sftmix.common.files import read_json, write_json
from sftmix.common.steps import read_steps
from sftmix.common.world import World
from sftmix.data import DataReport
from sftmix.measure.model import confidence_std

_OF_STAGE = [
    "wall_seconds",
    "elapsed",
    "scoring_seconds",
    "calibration_seconds",
    "steps",
    "total_steps",
    "tokens",
    "examples",
    "peak_memory_bytes",
    "skipped",
]
_OF_ARM = [
    "eval_accuracy",
    "eval_exact_match",
    "eval_nll_best",
    "eval_nll_best_step",
    "eval_nll_best_epoch",
    "calibration",
    "eval_nll_by",
]
"""Figures of stages, and of a trained one, that the summary has."""

UNMOVED = 5e-3
"""Relative change of the held-out NLL below which a training is said to have hardly changed the model."""
WORSE = 1e-3
"""Relative rise of the held-out NLL above which a model is said to be worse than its base model."""
BETTER = 1e-3
"""Nats per token by which an earlier evaluation must be better before it is worth a sentence."""
DIVERGED = 1.2
"""Ratio of the last losses of a reference to its first ones above which its training did harm."""
TIED = 0.01
"""Share of the examples above which ties at the cut get a remark."""


def summarise(
    root: Path, world: World, report: DataReport, *, model: str, seed: int, to: Path | None = None
) -> dict[str, Any]:
    """Write summary.json of the run directory `root` (rank 0) and return it.

    to  directory of the file; None: the run directory
    """
    stages = {p.parent.name: read_json(p) for p in sorted(root.glob("*/figures.json"))}
    train, split = stages.get("train", {}), stages.get("split", {})
    summary: dict[str, Any] = {
        **made_by(world.size),
        **train.get("made_by", {}),
        "model": model,
        "seed": seed,
        "data": report.to_dict(),
        "stages": {name: {k: figures[k] for k in _OF_STAGE if k in figures} for name, figures in stages.items()},
        "confounds": {**split.get("confounds", {})},
        "remarks": list(remarks(stages)),
    }
    if "confidence" in split:
        summary["confidence"] = split["confidence"]
    if train and "base" in stages:  # else it was stopped between the two
        summary["confounds"]["mixed_token_share"] = train["mixed_token_share"]
        summary["eval_nll_before"] = stages["base"].get("eval_nll")
        arms = [name for name in ("train", "baseline") if name in stages]
        for number, name in enumerate(arms):  # the target, and under `baseline` the same of the NTP run beside it
            told = {"eval_nll_after": stages[name].get("eval_nll")}
            told |= {figure: stages[name].get(figure) for figure in _OF_ARM}
            told["confidence_std"] = confidence_std(root, *arms[number:])
            summary |= told if name == "train" else {name: told}
        ntp, mixup = int(train["ntp_tokens"]), int(train["mixup_tokens"])
        # Without any NTP, Mixup has no other term to be weighed against.
        effective = train["mu_effective"] if ntp or not mixup else None
        summary |= {"ntp_tokens": ntp, "mixup_tokens": mixup, "mu_effective": effective}
    world.on_main(lambda: write_json((to or root) / "summary.json", summary))
    return summary


@cache
def made_by(world_size: int) -> dict[str, object]:
    """Return version, revision and world size of this process; a finished training keeps those it was made by.

    The revision is that of this package's source tree, `+` if it was changed; None outside a checkout.
    """
    here, revision = Path(sftmix.__file__).resolve().parent.parent, None  # above the package
    if (here / ".git").exists():
        command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
        with suppress(OSError):
            revision = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"version": sftmix.__version__, "git_revision": revision, "world_size": world_size}


# ------------------------------------------------------------------------------------------- remarks


def ends_of_loss(stage: Path) -> dict[str, float]:
    """Return the loss per token of the first and of the last steps of a stage: a tenth of all, or 8, or half.

    Steps whose loss was not finite are left out; {} with fewer than two others. It is weighted by tokens, because the
    last step of an epoch may hold a single short response.
    """
    lines = [line for line in read_steps(stage) if line["loss"] is not None and line["ntp_tokens"]]
    size, means = min(len(lines) // 2, max(8, len(lines) // 10)), {}
    for name, end in (("loss_first", lines[:size]), ("loss_last", lines[-size:])):
        if size:
            tokens = [line["ntp_tokens"] for line in end]
            means[name] = float(np.average([line["loss"] for line in end], weights=tokens))
    return means


def remarks(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the sentences about split, trained reference and target of a run; none if nothing is wrong.

    stages  stage -> its figures
    """
    tied = stages.get("split", {}).get("tied", 0)
    if tied > TIED:
        yield (
            f"{tied:.0%} of the examples have the same confidence as one on the other side of the cut, so confidence "
            "does not divide them (Median and Quantile order them by id)."
        )
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
    steps, skipped = train["steps"], int(train["skipped"])
    if skipped:
        yield (
            f"{skipped} of {steps} steps were skipped, since their gradients were not finite: if they are many, lower "
            "--training.learning_rate, or look for bad rows."
        )
    if train["stopped_by"]:
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
