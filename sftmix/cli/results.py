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
from sftmix.config.layers import read_yaml
from sftmix.options import as_list

STAGES = ("reference", "confidence", "split", "train", "baseline", "base")
_FILES = {
    "reference": ("confidence/dynamics.parquet",),
    "confidence": ("confidence/confidence.parquet",),
    "split": ("split/split.parquet",),
    "train": ("train/model", "train/metrics.jsonl", "summary.json"),
}


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
    lines = [*lines, *_mixing(summary), *_groups(summary), *([] if trained else _confounds(summary)), *_time(summary)]
    lines += [f"note: {remark}" for remark in summary.get("remarks", ())]
    files = [str(out / name) for name in _FILES[until] if (out / name).exists()]
    next_ones = following(out, summary, until)
    return [
        "",
        *lines,
        *([f"see {', '.join(files)}"] if files else []),
        *(["Next:", *(f"  {command}  # {why}" for command, why in next_ones)] if next_ones else []),
    ]


_NOT_HELD_OUT = ["held-out NLL: not measured, since no rows are held out; --data.eval_fraction 0.05 does so"]


def held_out(summary: Mapping[str, Any], meaning: str = "") -> list[str]:
    """Return one line with the held-out NLL per token before and after training, and of the baseline; or nothing."""
    after, best = summary.get("eval_nll_after"), summary.get("eval_nll_best")
    if not isinstance(after, float):
        return []
    before, baseline = summary.get("eval_nll_before"), (summary.get("baseline") or {}).get("eval_nll_after")
    figures = [("before", before), ("after", after), ("NTP baseline", baseline)]
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


def _mixing(summary: Mapping[str, Any]) -> list[str]:
    mixed, trained = summary.get("mixup_tokens"), summary.get("ntp_tokens")
    if not mixed:
        return []
    share = at(summary, "confounds.mixed_token_share")
    how_many = f"{mixed:,} token pairs" if not trained or share is None else f"{share:.0%} of the response tokens"
    lines = [f"Mixup: {how_many} were mixed with a token of the other example of their pair"]
    if effective := summary.get("mu_effective"):
        lines.append(f"mu_effective {effective:.2f}: what Mixup weighs per token, where NTP weighs 1")
    return lines


def _groups(summary: Mapping[str, Any]) -> list[str]:
    """Return one line with the size of each group and its median confidence, which no outlier moves."""
    groups, word = [], "median confidence "
    for name, group in (summary.get("confidence") or {}).items():
        median = group.get("confidence_median")
        if group["examples"]:
            what = "" if median is None else f" ({word}{short(median, digits=3)})"
            groups.append(f"{group['examples']:,} {name}{what}")
            word = "" if what else word
    return [f"groups: {', '.join(groups)}"] if groups else []


def _confounds(summary: Mapping[str, Any]) -> list[str]:
    found, lines = summary.get("confounds") or {}, []
    groups = [(name, group.get("labels")) for name, group in (summary.get("confidence") or {}).items()]
    shares = [f"{name}: {', '.join(f'{k} {v:.0%}' for k, v in labels.items())}" for name, labels in groups if labels]
    if shares:
        lines.append(f"labels of {'; '.join(shares)}")
    if overlap := found.get("label_overlap"):
        lines.append(
            f"overlap of the confidence of {' and '.join(overlap['labels'])}: {overlap['overlap']:.2f} "
            f"(labels at random: {overlap['overlap_if_unrelated']:.2f})"
        )
    rank, length = (found.get(key) for key in ("spearman_confidence_length", "auc_length_confident"))
    if rank is not None:
        lines.append(f"rank correlation of confidence with response length: {rank:.2f}")
    if length is not None:
        lines.append(f"AUC of response length telling the first group from the last: {length:.2f} (0.5: it cannot)")
    if (same := found.get("duplicates")) and same["prompts_in_both"]:
        lines.append(f"in both groups: {same['examples_in_both']:,} examples, {same['prompts_in_both']:,} prompts")
    return lines


def _time(summary: Mapping[str, Any]) -> list[str]:
    stages = summary.get("stages") or {}
    timed = {name: stages[name]["wall_seconds"] for name in STAGES if "wall_seconds" in stages.get(name, {})}
    shown = [f"{name} {_duration(seconds)}" for name, seconds in timed.items() if seconds >= 0.5]
    return [f"time: {', '.join(shown)}"] if shown else []


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# -------------------------------------------------------------------------------------------- what is next


def following(out: Path, summary: Mapping[str, Any], until: str) -> list[tuple[str, str]]:
    """Return commands that go on from a finished one, ready for a shell, each with a reason."""
    config, place = shlex.quote(str(out / "config.yaml")), shlex.quote(str(out))
    if not (out / "config.yaml").exists():
        return []
    if until != "train":
        return [(f"sftmix run --config {config} --out {place}", "goes on from here")]
    found = [_use_of(out)] if (out / "train" / "model").is_dir() else []
    if not summary.get("mixup_tokens") or not held_out(summary):
        return found
    if not summary.get("baseline"):
        return [
            *found,
            (f"sftmix run --config {config} --with_baseline --out {place}", "plain NTP beside it, for comparison"),
        ]
    table = shlex.quote(f"{out}-table")
    paired, objective = _pairs_by_itself(out)
    order = ", pairing: RandomPairs" if paired else ""  # else NTP would have an order of its own
    variants = f"--with_baseline false --variants '{{NTP: {{objective: NTP{order}}}, {objective}: {{}}}}'"
    compare = f"sftmix compare --config {config} {variants} --out {table}"
    return [*found, (compare, "one seed cannot say which is better; this takes six")]


def _pairs_by_itself(out: Path) -> tuple[bool, str]:
    """Return True if the run left its pairing to the objective (pairing: auto), and the name of the objective."""
    config = read_yaml(out / "config.yaml")
    objective = at(config, "objective.class_path") or "SFTMix"
    return bool(config.get("pairing") == "auto"), objective.rpartition(".")[2]


def _use_of(out: Path) -> tuple[str, str]:
    """Return the command that makes a whole model of adapters, or that talks to the model."""
    model = out / "train" / "model"
    if (model / "adapter_config.json").exists():
        return (
            f"sftmix export {shlex.quote(str(out))} --to {shlex.quote(f'{out}-merged')} --merge",
            "adapters -> a model",
        )
    return f"sftmix chat {shlex.quote(str(out))}", "talk to the model"
