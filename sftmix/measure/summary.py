"""summary.json: the results of a finished run, gathered from the artefacts of its stages."""

from __future__ import annotations

import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import sftmix
from sftmix.common.files import read_json, write_json
from sftmix.common.world import World
from sftmix.components.confidence import is_measured
from sftmix.data import LoadedData
from sftmix.measure.model import change, confidence_std, finite
from sftmix.measure.remarks import remarks
from sftmix.measure.split import ties_at_the_cut
from sftmix.types import UNPAIRED_NAME, Rows, Scores, Split

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


def summarise(
    root: Path,
    world: World,
    data: LoadedData,
    scores: Scores,
    split: Split | None,
    *,
    model: str,
    seed: int,
    to: Path | None = None,
) -> dict[str, Any]:
    """Write summary.json of the run directory `root` (rank 0) and return it.

    split  None if the run has none; without it nothing is told of the scores
    to     directory of the file; None: the run directory
    """
    stages = {p.parent.name: read_json(p) for p in sorted(root.glob("*/figures.json"))}
    maker = {**made_by(world.size), **stages.get("train", {}).get("made_by", {})}
    summary: dict[str, Any] = {
        **maker,
        "model": model,
        "seed": seed,
        "data": data.report.to_dict(),
        "stages": {name: {k: figures[k] for k in _OF_STAGE if k in figures} for name, figures in stages.items()},
    }
    file = root / "split" / "confounds.json"
    confounds = read_json(file) if "split" in stages and file.exists() else {}
    if {"train", "base"} <= stages.keys():  # else it was stopped between the two
        summary |= _training(root, stages)
        confounds["mixed_token_share"] = stages["train"]["mixed_token_share"]
    ties: list[str] = []
    if split is not None:
        ties = list(ties_at_the_cut(scores, split))
        groups = {name: _group(scores, split.rows(g)) for g, name in enumerate(split.names)}
        summary["confidence"] = {**groups, UNPAIRED_NAME: {"examples": len(split.unpaired)}}
    summary |= {"confounds": confounds, "remarks": [*ties, *remarks(stages)]}
    world.on_main(lambda: write_json((to or root) / "summary.json", summary))
    return summary


def made_by(world_size: int) -> dict[str, object]:
    """Return version, revision and world size of this process; a finished training keeps those it was made by."""
    return {"version": sftmix.__version__, "git_revision": git_revision(), "world_size": world_size}


def _training(root: Path, stages: dict[str, Any]) -> dict[str, Any]:
    train = stages["train"]
    figures: dict[str, Any] = {
        "eval_nll_before": stages["base"].get("eval_nll"),
        **_arm(root, "train", train),
        "ntp_tokens": int(train["ntp_tokens"]),
        "mixup_tokens": int(train["mixup_tokens"]),
        # Without any NTP, Mixup has no other term to be weighed against.
        "mu_effective": train["mu_effective"] if train["ntp_tokens"] or not train["mixup_tokens"] else None,
    }
    if "baseline" in stages:
        figures["baseline"] = _arm(root, "baseline", stages["baseline"])
        spread, plain = figures["confidence_std"], figures["baseline"]["confidence_std"]
        for prefix in ("", "log_"):
            spread[f"{prefix}vs_baseline"] = change(plain[f"{prefix}after"], spread[f"{prefix}after"])
    return figures


def _arm(root: Path, stage: str, figures: dict[str, Any]) -> dict[str, Any]:
    arm = {"eval_nll_after": figures.get("eval_nll"), **{name: figures.get(name) for name in _OF_ARM}}
    return {**arm, "confidence_std": confidence_std(root / "base", root / stage)}


def _group(scores: Scores, rows: Rows) -> dict[str, Any]:
    values = scores.confidence[rows]
    values = values[is_measured(values)]
    labels = Counter(scores.label[row] for row in rows) if scores.label is not None else {}
    return {
        "examples": len(rows),
        "confidence_mean": finite(np.mean, values),
        "confidence_std": finite(np.std, values),
        "confidence_median": finite(np.median, values),
        "response_tokens_mean": finite(np.mean, scores.n_tokens[rows]),
        "labels": {str(label): count / len(rows) for label, count in sorted(labels.items(), key=str)},
    }


@cache
def git_revision() -> str | None:
    """Return the revision of this package's source tree, `+` if it was changed; None outside a checkout."""
    here = Path(sftmix.__file__).resolve().parent.parent  # above the package, wherever this file stands in it
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
