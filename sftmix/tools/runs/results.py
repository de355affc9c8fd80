"""What a run says at its end: the figures of summary.json in words, and where to look next."""

import shlex
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from sftmix.common.shown import short
from sftmix.config.merge import CLASS

STAGES = ("reference", "confidence", "split", "train", "baseline", "base")


def results(out: str | Path, summary: Mapping[str, Any], until: str, *, own: bool = False) -> list[str]:
    """Return about a dozen lines for people: figures of summary.json, which has all, and commands that go on.

    own  whether the configuration names classes that are not of this package
    """
    out, trained = Path(out), until == "train"
    lines = ["", *held_out(summary)]
    if len(lines) == 1 and trained and summary.get("stages"):
        lines.append("held-out NLL: not measured, since no rows are held out; --data.eval_fraction 0.05 does so")
    if trained and (share := at(summary, "confounds.mixed_token_share")):
        lines.append(f"Mixup: {share:.0%} of the response tokens were mixed with a token of the other of their pair")
    if effective := summary.get("mu_effective"):
        lines.append(f"mu_effective {effective:.2f}: the weight of Mixup per token, with NTP's as 1")
    lines += _groups(summary)
    seconds = {name: at(summary, f"stages.{name}.wall_seconds") for name in STAGES}
    if timed := [f"{name} {timedelta(seconds=round(taken))}" for name, taken in seconds.items() if taken]:
        lines.append(f"time: {', '.join(timed)}")
    lines += [f"note: {remark}" for remark in summary.get("remarks", ())]
    stage = {"reference": "confidence/dynamics.parquet", "train": "train/model"}.get(until, f"{until}/{until}.parquet")
    if files := [str(out / name) for name in (stage, "summary.json") if (out / name).exists()]:
        lines.append(f"see {', '.join(files)}")
    return [*lines, "Next:", *_commands(out, until, " --trust" if own else "")]


def _groups(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each group of the split that has examples."""
    for name, group in (summary.get("confidence") or {}).items():
        if group["examples"]:
            median = group.get("confidence_median")
            what = "" if median is None else f", median confidence {short(median, digits=3)}"
            yield f"{name}: {group['examples']:,} examples{what}"


def names_own_classes(plain: Any) -> bool:
    """Return whether a configuration in plain form names a class that is not of this package."""
    if isinstance(plain, list):
        return any(map(names_own_classes, plain))
    if not isinstance(plain, Mapping):
        return False
    return not str(plain.get(CLASS, "sftmix.")).startswith("sftmix.") or any(map(names_own_classes, plain.values()))


def _commands(out: Path, until: str, trust: str) -> Iterator[str]:
    """Yield the commands that go on from a stage."""
    place = shlex.quote(str(out))
    if until == "train":
        yield f"  sftmix chat {place}  # talk to the model"
        yield f"  sftmix report {place}{trust}  # what it saw, and what came out"
        return
    if until == "confidence":
        yield f"  sftmix suspects {place}{trust}  # rows to read first"
    yield f"  sftmix run --config {shlex.quote(str(out / 'config.yaml'))} --out {place}{trust}  # goes on from here"


def held_out(summary: Mapping[str, Any]) -> list[str]:
    """Return one line with the held-out NLL per token before and after training, and of the baseline; or nothing."""
    figures = {
        "before": "eval_nll_before",
        "after": "eval_nll_after",
        "NTP baseline": "baseline.eval_nll_after",
        "best": "eval_nll_best",
    }
    values = {name: at(summary, key) for name, key in figures.items()}
    if values["after"] is None:
        return []
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float))
    return [f"held-out NLL per response token (lower is better): {shown}"]


def at(arm: Mapping[str, Any], key: str) -> Any:
    """Return arm["a"]["b"] for "a.b", or None if it is absent."""
    value: Any = arm
    for name in key.split("."):
        value = (value or {}).get(name)
    return value
