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
from sftmix.data import EncodedDataset, LoadedData
from sftmix.measure.model import confidence_std
from sftmix.measure.remarks import remarks
from sftmix.measure.split import length_correlation, mixing, ties_at_the_cut
from sftmix.types import UNPAIRED_NAME, Rows, Scores, Split

EXTREMES = 5
"""Number of the most and of the least confident examples that are shown."""


def summarise(
    root: Path,
    world: World,
    data: LoadedData,
    scores: Scores,
    split: Split | None,
    *,
    model: str,
    seed: int,
    learning_rate: float,
    to: Path | None = None,
) -> dict[str, Any]:
    """Write summary.json of the run directory `root` (rank 0) and return it.

    split  None if the run has none; without it nothing is told of the scores
    learning_rate  of the target, for the remarks
    to     directory of the file; None: the run directory
    """
    stages = {p.parent.name: read_json(p) for p in sorted(root.glob("*/figures.json"))}
    made = {**made_by(world.size), **stages.get("train", {}).get("made_by", {})}
    summary: dict[str, object] = {
        "version": made["version"],
        "git_revision": made["git_revision"],
        "model": model,
        "seed": seed,
        "world_size": made["world_size"],
        "data": data.report.to_dict(),
        "stages": {name: _stage(figures) for name, figures in stages.items()},
    }
    if "train" in stages:
        summary |= _training(root, stages)
    if split is not None:
        summary |= _confidence(data.train, scores, split)
    summary["confounds"] = _confounds(root, stages)
    ties = () if split is None else ties_at_the_cut(scores, split)
    summary["remarks"] = [*ties, *remarks(root, stages, learning_rate)]
    world.on_main(lambda: write_json((to or root) / "summary.json", summary))
    return summary


def made_by(world_size: int) -> dict[str, object]:
    """Return version, revision and world size of this process; a finished training keeps those it was made by."""
    return {"version": sftmix.__version__, "git_revision": git_revision(), "world_size": world_size}


def _stage(figures: dict[str, object]) -> dict[str, object]:
    kept = (
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
    )
    return {k: figures[k] for k in kept if k in figures}


def _training(root: Path, stages: dict[str, Any]) -> dict[str, Any]:
    train = stages["train"]
    found: dict[str, Any] = {
        "eval_nll_before": stages.get("base", {}).get("eval_nll"),
        **_trained(root, "train", train),
        "ntp_tokens": int(train["ntp_tokens"]),
        "mixup_tokens": int(train["mixup_tokens"]),
        # Without any NTP, Mixup has no other term to be weighed against.
        "mu_effective": train["mu_effective"] if train["ntp_tokens"] or not train["mixup_tokens"] else None,
    }
    if "baseline" in stages:
        found["baseline"] = _trained(root, "baseline", stages["baseline"])
        spread, plain = (arm["confidence_std"] for arm in (found, found["baseline"]))
        for prefix in ("", "log_"):
            ours, theirs = spread.get(f"{prefix}after"), plain.get(f"{prefix}after")
            spread[f"{prefix}vs_baseline"] = ours / theirs - 1 if ours is not None and theirs else None
    return found


def _trained(root: Path, name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the results of one arm."""
    measured = ("eval_nll_best", "eval_nll_best_step", "eval_nll_best_epoch", "calibration")
    names = {"eval_nll": "eval_nll_after"} | {k: k for k in ("eval_accuracy", "eval_exact_match", *measured)}
    found = {shown: figures.get(key) for key, shown in names.items()}
    if "eval_nll_by" in figures:
        found["eval_nll_by"] = figures["eval_nll_by"]
    return {**found, "confidence_std": confidence_std(root / "base", root / name)}


def _confidence(rows: EncodedDataset, scores: Scores, split: Split) -> dict[str, object]:
    groups = {name: _group(scores, split.rows(g)) for g, name in enumerate(split.names)}
    groups[UNPAIRED_NAME] = {"examples": len(split.unpaired)}
    scored = np.flatnonzero(is_measured(scores.confidence))
    order = scored[np.argsort(scores.confidence[scored], kind="stable")]
    return {
        "confidence": groups,
        "spearman_confidence_length": length_correlation(scores),
        "least_confident": [_shown(rows, scores, int(row)) for row in order[:EXTREMES]],
        "most_confident": [_shown(rows, scores, int(row)) for row in order[::-1][:EXTREMES]],
    }


def _confounds(root: Path, stages: dict[str, Any]) -> dict[str, Any]:
    """Return the confounds of the split, and how much was mixed; empty if there is neither."""
    path = root / "split" / "confounds.json"
    of_split = read_json(path) if "split" in stages and path.exists() else {}
    return {**of_split, **(mixing(stages["train"]) if "train" in stages else {})}


def _group(scores: Scores, rows: Rows) -> dict[str, object]:
    values = scores.confidence[rows]
    values = values[is_measured(values)]
    with np.errstate(over="ignore", invalid="ignore"):  # the perplexities of a reference that diverged
        spread = float(values.std()) if len(values) else np.nan
    return {
        "examples": len(rows),
        "confidence_mean": float(values.mean()) if len(values) else None,
        "confidence_std": spread if np.isfinite(spread) else None,
        "confidence_median": float(np.median(values)) if len(values) else None,
        "response_tokens_mean": float(scores.n_tokens[rows].mean()) if len(rows) else None,
        "labels": _shares([scores.label[row] for row in rows]) if scores.label is not None else {},
    }


def _shares(labels: list[str | None]) -> dict[str, float]:
    """Return the share of each label (data.label_field) among some examples."""
    return {str(label): count / len(labels) for label, count in sorted(Counter(labels).items(), key=str)}


def _shown(rows: EncodedDataset, scores: Scores, row: int) -> dict[str, object]:
    messages = rows.example(row).messages
    return {
        "id": scores.id[row],
        "confidence": float(scores.confidence[row]),
        "response_tokens": int(scores.n_tokens[row]),
        "prompt": messages[-2].content[:200] if len(messages) > 1 else "",
        "response": messages[-1].content[:200],
    }


@cache
def git_revision() -> str | None:
    """Return the revision of this package's source tree, `+` if it was changed; None outside a checkout."""
    here = Path(sftmix.__file__).resolve().parent.parent  # above the package, wherever this file stands in it
    if not (here / ".git").exists():
        return None
    try:
        asked = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
