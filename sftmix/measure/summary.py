"""summary.json, which gathers the figures of all stages of a run."""

import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import sftmix
from sftmix.components.others.calibration import Calibration
from sftmix.components.others.remarks import Remarks
from sftmix.config import RunConfig
from sftmix.data import DataReport
from sftmix.disk.files import naming_damage, read_json, write_json
from sftmix.measure.delivered import check_sentences
from sftmix.measure.model import confidence_std
from sftmix.ranks.world import World

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
    "eval_nll_as_trained",
    "eval_nll_best",
    "eval_nll_best_step",
    "eval_nll_best_epoch",
    "calibration",
]
"""Figures of stages, and of a trained one, that the summary has."""


def summarise(root: Path, world: World, report: DataReport, config: RunConfig, *, to: Path) -> dict[str, Any]:
    """Write summary.json of the run directory `root` into the directory `to` (rank 0), and return it.

    Raises DifferenceError for figures of stages that are not as a run writes them.
    """
    with naming_damage(f"a figures.json of {root}"):
        summary = _gathered(root, world, report, config)
    world.on_main(lambda: write_json(to / "summary.json", summary))
    return summary


def _gathered(root: Path, world: World, report: DataReport, config: RunConfig) -> dict[str, Any]:
    stages = {p.parent.name: read_json(p) for p in sorted(root.glob("*/figures.json"))}
    train, split = stages.get("train", {}), stages.get("split", {})
    summary = {
        **made_by(world.size),
        **train.get("made_by", {}),
        "model": config.model.path,
        "seed": config.seed,
        "data": report.to_dict(),
        "stages": {name: {k: figures[k] for k in _OF_STAGE if k in figures} for name, figures in stages.items()},
        "confounds": split.get("confounds", {}),
        "remarks": _remarks(config, stages),
    }
    measuring = (Calibration, Remarks)
    lacking = [kind.__name__ for kind in measuring if not any(isinstance(one, kind) for one in config.callbacks)]
    if lacking:  # so that a null is explained
        summary["not_in_callbacks"] = lacking
    if "confidence" in split:
        summary["confidence"] = split["confidence"]
    if train and "base" in stages:  # else it was stopped between the two
        summary["confounds"]["mixed_token_share"] = train["mixed_token_share"]
        summary["eval_nll_before"] = stages["base"].get("eval_nll")
        arms = [name for name in ("train", "baseline") if name in stages]
        for number, name in enumerate(arms):  # the target, and under `baseline` the same of the NTP run beside it
            of_arm = {"eval_nll_after": stages[name].get("eval_nll")}
            of_arm |= {figure: stages[name].get(figure) for figure in _OF_ARM}
            of_arm["confidence_std"] = confidence_std(root, *arms[number:])
            summary |= of_arm if name == "train" else {name: of_arm}
        ntp, mixup = int(train["ntp_tokens"]), int(train["mixup_tokens"])
        summary |= {
            "ntp_tokens": ntp,
            "mixup_tokens": mixup,
            # Without any NTP, Mixup has no other term to be weighed against.
            "mu_effective": train["mu_effective"] if ntp or not mixup else None,
        }
    return summary


def _remarks(config: RunConfig, stages: Mapping[str, Any]) -> list[str] | None:
    """Return the sentences of all callbacks; None if no callback makes any."""
    said = [check_sentences(callback, callback.on_summary(stages)) for callback in config.callbacks]
    made = [sentences for sentences in said if sentences is not None]
    return [sentence for sentences in made for sentence in sentences] if made else None


@cache
def made_by(world_size: int) -> dict[str, object]:
    """Return version, revision and world size of this process; a finished training keeps those it was made by.

    The revision is of this package's source tree, `+` if it was changed; None outside a checkout.
    """
    here = Path(sftmix.__file__).resolve().parent.parent  # above the package
    revision = None
    if (here / ".git").exists():
        command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
        with suppress(OSError):
            revision = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"version": sftmix.__version__, "git_revision": revision, "world_size": world_size}
