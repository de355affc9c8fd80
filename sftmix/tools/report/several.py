"""Figures of several runs side by side, and of a table that `sftmix compare` made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from sftmix.common.figures import counted, unit_of
from sftmix.common.steps import read_steps
from sftmix.tools.report.curves import curve, losses_of
from sftmix.tools.report.figures import GROUPS, figure


@dataclass(frozen=True)
class SideBySide:
    """A run among others: its name, the variant that decides its colour, and its summary."""

    path: Path
    name: str
    variant: str
    summary: Mapping[str, Any]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of its target."""
        return read_steps(self.path / "train")


def forest(table: Mapping[str, Any]) -> go.Figure | None:
    """Paired differences of the table's metric with their intervals, one line per contrast; a point for every seed."""
    contrasts = [c for c in table["contrasts"] if c["mean"] is not None]
    if not contrasts:
        return None
    names = [escape(f"{c['ours']} - {c['theirs']}") for c in contrasts]
    p_values = ["" if c["p_holm"] is None else f"; p after Holm {c['p_holm']:.3g}" for c in contrasts]
    arms = [[abs(end - c["mean"]) for end in c["interval"] or [c["mean"]] * 2] for c in contrasts]
    means = go.Scatter(
        x=[c["mean"] for c in contrasts],
        y=names,
        mode="markers",
        name="mean, with 95% interval" if any(c["interval"] for c in contrasts) else "mean",
        marker={"size": 11, "symbol": "diamond", "color": GROUPS[0]},
        error_x={"type": "data", "symmetric": False, "array": [b for _, b in arms], "arrayminus": [a for a, _ in arms]},
        customdata=[escape(c["verdict"] + p) for c, p in zip(contrasts, p_values, strict=True)],
        hovertemplate="%{y}: %{x:.4f}<br>%{customdata}<extra></extra>",
    )
    seeds = go.Scatter(
        x=[difference for c in contrasts for difference in c["differences"]],
        y=[name for c, name in zip(contrasts, names, strict=True) for _ in c["seeds"]],
        mode="markers",
        name="seeds",
        marker={"size": 7, "color": GROUPS[1]},
        customdata=[seed for c in contrasts for seed in c["seeds"]],
        hovertemplate="%{y}, seed %{customdata}: %{x:.4f}<extra></extra>",
    )
    zero = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 0, "x1": 0, "line": {"dash": "dash", "width": 1}}
    axis = {"automargin": True, "autorange": "reversed"}
    title = f"difference in {table['metric']} (left of 0: the first is lower)"
    return figure(means, seeds, x=title, y="", yaxis=axis, shapes=[zero], height=180 + 48 * len(names))


def contrast_lines(table: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each contrast, after one that says what the numbers are."""
    found = []
    for c in table["contrasts"]:
        if c["mean"] is None:
            continue
        interval = "" if not c["interval"] else f" [{c['interval'][0]:+.4f}, {c['interval'][1]:+.4f}]"
        seeds = counted(len(c["seeds"]), "seed")
        found.append(f"{c['ours']} - {c['theirs']}: {c['mean']:+.4f}{interval} over {seeds}; {c['verdict']}.")
    unit = f" ({unit_of(table['metric'])})" if unit_of(table["metric"]) else ""
    brackets = ", with 95% intervals in brackets" if any(c["interval"] for c in table["contrasts"]) else ""
    return [f"Differences in {table['metric']}{unit}{brackets}.", *found] if found else []


def curves_over_one_another(runs: Sequence[SideBySide], key: str, title: str) -> go.Figure | None:
    """One figure of metrics.jsonl of the train stage of all runs; a colour for each variant."""
    colours = {v: GROUPS[k % len(GROUPS)] for k, v in enumerate(dict.fromkeys(run.variant for run in runs))}
    traces, named = [], set()
    for run in runs:
        lines = losses_of(run.metrics, key)
        x, y = curve([line["step"] for line in lines], [line.get(key) for line in lines])
        if not x:
            continue
        trace = go.Scatter(
            x=x,
            y=y,
            name=escape(run.variant),
            legendgroup=run.variant,
            showlegend=run.variant not in named,
            mode="lines+markers" if len(x) < 30 else "lines",
            line={"width": 1, "color": colours[run.variant]},
            text=escape(run.name),
            hovertemplate="%{text}, step %{x}: %{y:.4f}<extra></extra>",
        )
        traces.append(trace)
        named.add(run.variant)
    return figure(*traces, x="optimizer step", y=title) if traces else None
