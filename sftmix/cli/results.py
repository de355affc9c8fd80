"""Output of commands: notes on the way, then the figures of summary.json in words, and where to look next."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from sftmix.common.figures import short
from sftmix.common.shown import as_lines
from sftmix.config import RunConfig
from sftmix.options import as_list

STAGES = ("reference", "confidence", "split", "train", "baseline", "base")
_FILES = {
    "reference": ("confidence/dynamics.parquet",),
    "confidence": ("confidence/confidence.parquet",),
    "split": ("split/split.parquet",),
    "train": ("train/model", "train/metrics.jsonl", "summary.json"),
}
_NOT_HELD_OUT = ["held-out NLL: not measured, since no rows are held out; --data.eval_fraction 0.05 does so"]


def say(text: str, file: TextIO | None = None) -> None:
    """Print on rank 0 only: notes to stderr, or results to the given file. No text controls the terminal."""
    if os.environ.get("RANK", "0") == "0":
        print(as_lines(text), file=file or sys.stderr, flush=True)


def starting(name: str, config: RunConfig) -> str:
    """Return the line that a command begins with, while its libraries are still to be loaded."""
    rows = as_list(config.data.train)
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"{name}: {config.model.path} on {rows[0]}{more}, in {config.out}"


def results(out: str | Path, summary: Mapping[str, Any], until: str) -> list[str]:
    """Return about a dozen lines for people; all figures are in summary.json.

    After training they are the held-out NLL, Mixup and groups, before it what is known of the groups; then time,
    remarks, files, and commands that go on from here.
    """
    out, trained = Path(out), until == "train"
    lines = held_out(summary, " (lower is better)") or (_NOT_HELD_OUT if trained and summary.get("stages") else [])
    share = at(summary, "confounds.mixed_token_share")
    if trained and share:
        effective = summary.get("mu_effective") or 0.0
        lines = [
            *lines,
            f"Mixup: {share:.0%} of the response tokens were mixed; mu_effective {effective:.2f} per token",
        ]
    groups = (summary.get("confidence") or {}).items()
    sizes = [f"{group['examples']:,} {name}{_median(group)}" for name, group in groups if group["examples"]]
    lines += [f"groups: {', '.join(sizes)}"] if sizes else []
    rank = at(summary, "confounds.spearman_confidence_length")
    if rank is not None and not trained:
        lines.append(f"rank correlation of confidence with response length: {rank:.2f}")
    stages = summary.get("stages") or {}
    seconds = {name: stages[name]["wall_seconds"] for name in STAGES if "wall_seconds" in stages.get(name, {})}
    if timed := [f"{name} {_duration(took)}" for name, took in seconds.items() if took >= 0.5]:
        lines.append(f"time: {', '.join(timed)}")
    lines += [f"note: {remark}" for remark in summary.get("remarks", ())]
    if files := [str(out / name) for name in _FILES[until] if (out / name).exists()]:
        lines.append(f"see {', '.join(files)}")
    commands = following(out, summary, until)
    return ["", *lines, *(["Next:", *(f"  {command}  # {why}" for command, why in commands)] if commands else [])]


def _median(group: Mapping[str, Any]) -> str:
    """Return the median confidence of a group, which no outlier moves."""
    median = group.get("confidence_median")
    return "" if median is None else f" (median confidence {short(median, digits=3)})"


def held_out(summary: Mapping[str, Any], meaning: str = "") -> list[str]:
    """Return one line with the held-out NLL per token before and after training, and of the baseline; or nothing."""
    after, best = summary.get("eval_nll_after"), summary.get("eval_nll_best")
    if not isinstance(after, float):
        return []
    baseline = at(summary, "baseline.eval_nll_after")
    figures = [("before", summary.get("eval_nll_before")), ("after", after), ("NTP baseline", baseline)]
    shown = [f"{name} {value:.4f}" for name, value in figures if isinstance(value, float)]
    if isinstance(best, float) and best < after:
        shown.append(f"best {best:.4f} at step {summary['eval_nll_best_step']}")
    return [f"held-out NLL per response token{meaning}: {', '.join(shown)}"]


def at(arm: Mapping[str, Any], key: str | None) -> Any:
    """Return arm["a"]["b"] for "a.b", or None if it is absent."""
    value: Any = arm
    for name in key.split(".") if key else []:
        value = (value or {}).get(name)
    return value if key else None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def following(out: Path, summary: Mapping[str, Any], until: str) -> list[tuple[str, str]]:
    """Return commands that go on from a finished one, ready for a shell, each with a reason."""
    config, place, model = shlex.quote(str(out / "config.yaml")), shlex.quote(str(out)), out / "train" / "model"
    commands = []
    if not (out / "config.yaml").exists():
        return []
    if until != "train":
        return [(f"sftmix run --config {config} --out {place}", "goes on from here")]
    if (model / "adapter_config.json").exists():
        merged = shlex.quote(f"{out}-merged")
        commands.append((f"sftmix export {place} --to {merged} --merge", "adapters -> a model"))
    elif model.is_dir():
        commands.append((f"sftmix chat {place}", "talk to the model"))
    if summary.get("mixup_tokens") and held_out(summary) and not summary.get("baseline"):
        baseline = f"sftmix run --config {config} --with_baseline --out {place}"
        commands.append((baseline, "plain NTP beside it, for comparison"))
    return commands
