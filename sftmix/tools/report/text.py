"""The figures of runs as text: one table of arms or runs, one of groups, and sentences on a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.figures import flatten, short
from sftmix.common.tables import read_eval

FIGURES = {
    "held-out NLL": "eval_nll_after",
    "best": "eval_nll_best",
    "token accuracy": "eval_accuracy",
    "exact match": "eval_exact_match",
    "ECE": "calibration.ece",
    "std of NLL": "confidence_std.log_after",
    "mu_effective": "mu_effective",
}
"""Columns of the table of arms -> figure of summary.json."""


def arms_table(arms: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return a table, its head first, of what was measured of models: name -> its part of summary.json."""
    rows = [["", *FIGURES]]
    for name, arm in arms.items():
        figures = dict(flatten(arm))
        values = [figures.get(key, math.nan) for key in FIGURES.values()]
        rows.append([name, *("" if math.isnan(value) else f"{value:.4f}" for value in values)])
    return rows


def arms_of(summary: Mapping[str, Any], objective: str) -> dict[str, Mapping[str, Any]]:
    """Return the base model, the target and, if there is one, the NTP baseline, by their names."""
    spread = (summary.get("confidence_std") or {}).get("log_before")
    base = {"eval_nll_after": summary.get("eval_nll_before"), "confidence_std": {"log_after": spread}}
    baseline = {"NTP baseline": summary["baseline"]} if "baseline" in summary else {}
    return {"base model": base, objective: summary, **baseline}


def groups_table(groups: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return a table of the groups of a split, its head first."""
    rows = [["group", "examples", "median confidence", "response tokens"]]
    for name, group in groups.items():
        median, tokens = group.get("confidence_median"), group.get("response_tokens_mean")
        cells = ["" if median is None else short(median), "" if tokens is None else f"{tokens:.0f}"]
        rows.append([name, f"{group['examples']:,}", *cells])
    return rows


def contrasts_table(contrasts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a table of the paired differences of a table.json, its head first."""
    rows = [["difference", "mean", "95% interval", "seeds", "verdict"]]
    for c in contrasts:
        if c["mean"] is not None:
            interval = "{:+.4f} to {:+.4f}".format(*c["interval"]) if c["interval"] else ""
            rows.append(
                [f"{c['ours']} - {c['theirs']}", f"{c['mean']:+.4f}", interval, str(len(c["seeds"])), c["verdict"]]
            )
    return rows


def sentences(run: Path, summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the page of a run says first: its remarks, length, mixing, and the target beside its baseline."""
    yield from summary["remarks"]
    confounds = summary["confounds"]
    if confounds.get("auc_length_confident") is not None:
        yield (
            f"A confident response is longer than an unconfident one with a probability of "
            f"{confounds['auc_length_confident']:.0%} (50%: length says nothing). The splitters LengthMatched and "
            "RandomSplit are the controls."
        )
    if summary["mixup_tokens"]:
        yield f"{confounds['mixed_token_share']:.0%} of the response tokens met a token of another example in Mixup."
    if "baseline" in summary and summary["eval_nll_after"] is not None:
        mean, error = paired_difference(run)
        yield (
            f"Held-out NLL of the target minus that of the NTP baseline: {mean:+.4f} nats per response token, with a "
            f"standard error of {error:.4f} over the held-out examples alone. This is one seed; differences between "
            "seeds are often larger, and sftmix compare measures them."
        )


def paired_difference(run: Path) -> tuple[float, float]:
    """Return target - baseline in held-out NLL per token, and its standard error over examples (ratio estimator).

    The error of a single example is not known: NaN.
    """
    (ids, ours, _), (_, theirs, _) = (read_eval(run / stage / "eval.parquet") for stage in ("train", "baseline"))
    off, tokens, n = ours.nll_sum - theirs.nll_sum, ours.n_tokens, len(ids)
    mean = off.sum() / tokens.sum()
    squares = float(np.square(off - mean * tokens).sum())
    return float(mean), math.sqrt(n / (n - 1) * squares) / float(tokens.sum()) if n > 1 else math.nan
