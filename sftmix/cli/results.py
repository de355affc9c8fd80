"""Output of commands: notes on the way, then the figures of summary.json in words, and where to look next."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from sftmix.config import RunConfig
from sftmix.options import as_list

STAGES = ("reference", "confidence", "split", "train", "baseline", "base")
_FILES = {
    "reference": ("confidence/dynamics.parquet",),
    "confidence": ("confidence/confidence.parquet",),
    "split": ("split/split.parquet",),
    "train": ("train/model", "train/metrics.jsonl", "summary.json"),
}


def say(text: str, file: TextIO | None = None) -> None:
    """Print on rank 0 only: notes to stderr, or results to the given file."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file or sys.stderr, flush=True)


def starting(name: str, config: RunConfig) -> str:
    """Return the line that a command begins with, while its libraries are still to be loaded."""
    rows = as_list(config.data.train)
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"{name}: {config.model.path} on {rows[0]}{more}, in {config.out}"


def results(out: str | Path, summary: Mapping[str, Any], until: str) -> list[str]:
    """Return lines for people: a table of measurements, the groups of the split, their confounds, time, files."""
    lines = [*measured(summary), *_groups(summary), *_confounds(summary), *_mixing(summary), *_time(summary)]
    lines += [f"note: {remark}" for remark in summary.get("remarks", ())]
    return ["", *lines, *(f"see {Path(out) / name}" for name in _FILES[until] if (Path(out) / name).exists())]


def held_out(summary: Mapping[str, Any]) -> list[str]:
    """Return one line with the held-out NLL per token before and after training, and of the baseline."""
    after = summary.get("eval_nll_after")
    if not isinstance(after, float):
        return []
    before, baseline = summary.get("eval_nll_before"), (summary.get("baseline") or {}).get("eval_nll_after")
    figures = [("before", before), ("after", after), ("NTP baseline", baseline)]
    shown = [f"{name} {value:.4f}" for name, value in figures if isinstance(value, float)]
    return [f"held-out NLL per response token: {', '.join(shown)}"]


MEASURED = (
    ("held-out NLL per response token", "eval_nll_before", "eval_nll_after", ".4f"),
    ("  of the best evaluation", None, "eval_nll_best", ".4f"),
    ("    which was at step", None, "eval_nll_best_step", "d"),
    ("  after temperature scaling", None, "calibration.nll_temperature_scaled", ".4f"),
    ("    mean temperature", None, "calibration.temperature", ".3f"),
    ("held-out token calibration error (ECE)", None, "calibration.ece", ".4f"),
    ("held-out Brier score", None, "calibration.brier", ".4f"),
    ("held-out token accuracy", None, "eval_accuracy", ".1%"),
    ("held-out exact match", None, "eval_exact_match", ".1%"),
    ("sd of confidence, minus perplexity", "confidence_std.before", "confidence_std.after", ".4g"),
    ("sd of confidence, minus mean NLL", "confidence_std.log_before", "confidence_std.log_after", ".4f"),
)
"""What is told of an arm, where the summary has it before and after training, and its format."""


def measured(summary: Mapping[str, Any]) -> list[str]:
    """Return a table with a column each for the base model, the trained model, and the NTP baseline if any."""
    arms = {"after": summary, "NTP baseline": summary.get("baseline") or {}}
    lines = []
    for name, before, after, form in MEASURED:
        values = [at(summary, before), *(at(arm, after) for arm in arms.values())]
        if any(value is not None for value in values[1:]):
            cells = ["" if value is None else format(value, form) for value in values]
            lines.append(f"{name:<40}{cells[0]:>10}{cells[1]:>10}{cells[2]:>14}".rstrip())
    title = f"{'':<40}{'before':>10}{'after':>10}{'NTP baseline' if arms['NTP baseline'] else '':>14}".rstrip()
    return [title, *lines, *_relative(summary), ""] if lines else []


def at(arm: Mapping[str, Any], key: str | None) -> Any:
    """Return arm["a"]["b"] for "a.b", or None if it is absent."""
    value: Any = arm
    for name in key.split(".") if key else []:
        value = (value or {}).get(name)
    return value if key else None


def _relative(summary: Mapping[str, Any]) -> list[str]:
    spread = summary.get("confidence_std") or {}
    against, log_against = spread.get("vs_baseline"), spread.get("log_vs_baseline")
    if against is None or log_against is None:
        return []
    return [f"sd of confidence against the NTP baseline: {against:+.1%}, of minus mean NLL: {log_against:+.1%}"]


def _groups(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, group in (summary.get("confidence") or {}).items():
        mean, spread = group.get("confidence_mean"), group.get("confidence_std")
        what = "" if mean is None else f", confidence {mean:.2f} +- {spread:.2f}"
        if group["examples"]:
            lines.append(f"{name}: {group['examples']:,} example{'s' * (group['examples'] != 1)}{what}")
    return lines


def _confounds(summary: Mapping[str, Any]) -> list[str]:
    found = summary.get("confounds") or {}
    lines = [
        f"label {name}: {label['examples']:,} examples, confidence {label['confidence_mean']:.2f} +- "
        f"{label['confidence_std']:.2f}"
        for name, label in (found.get("labels") or {}).items()
    ]
    if overlap := found.get("label_overlap"):
        lines.append(
            f"overlap of the confidence of {' and '.join(overlap['labels'])}: {overlap['overlap']:.2f} "
            f"(labels at random: {overlap['overlap_if_unrelated']:.2f})"
        )
    rank, length = summary.get("spearman_confidence_length"), found.get("auc_length_confident")
    if rank is not None:
        lines.append(f"rank correlation of confidence with response length: {rank:.2f}")
    if length is not None:
        lines.append(f"AUC of response length telling the first group from the last: {length:.2f} (0.5: it cannot)")
    if (same := found.get("duplicates")) and same["prompts_in_both"]:
        lines.append(f"in both groups: {same['examples_in_both']:,} examples, {same['prompts_in_both']:,} prompts")
    return lines


def _mixing(summary: Mapping[str, Any]) -> list[str]:
    mixed, trained = summary.get("mixup_tokens"), summary.get("ntp_tokens")
    if not mixed or not trained:
        return []
    share = (summary.get("confounds") or {}).get("mixed_token_share")
    of_all = "" if share is None else f" ({share:.0%} of them mixed)"
    effective = f", mu_effective {summary['mu_effective']:.2f}" if summary.get("mu_effective") else ""
    return [f"{mixed:,} token pairs mixed beside {trained:,} response tokens{of_all}{effective}"]


def _time(summary: Mapping[str, Any]) -> list[str]:
    stages = summary.get("stages") or {}
    timed = {name: stages[name]["wall_seconds"] for name in STAGES if "wall_seconds" in stages.get(name, {})}
    shown = [f"{name} {seconds:.0f} s" for name, seconds in timed.items()]
    return [f"time: {', '.join(shown)}"] if shown else []
