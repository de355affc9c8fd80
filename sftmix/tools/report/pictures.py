"""Figures of the examples of a run. Each is None where the run has nothing to show there."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sftmix.common.figures import short
from sftmix.common.files import read_json
from sftmix.common.tables import read_dynamics
from sftmix.components.confidence import LEAST
from sftmix.measure.model import SAMPLE
from sftmix.tools.report.ends import Topic
from sftmix.tools.report.examples import correctness
from sftmix.tools.report.figures import COLOURS, GROUPS, figure
from sftmix.tools.report.run import ARMS, RunView
from sftmix.types import Float64, Rows

CORRECT = [[0.0, "#d6503c"], [0.5, "#d9a63a"], [1.0, "#3f8fd2"]]
"""Colours of correctness from the least to the most, seen on light and dark paper alike."""

POINTS = 4000
"""Most points of a scatter plot."""
ENDS = 400
"""Points of each end, and of the largest variability, that thinning keeps."""


def thinned(view: RunView) -> Rows:
    """Return at most POINTS rows with a confidence, in file order: both ends, the most variable, and evenly between."""
    ordered = view.by_confidence
    if len(ordered) <= POINTS:
        return np.sort(ordered)
    spread = np.nan_to_num(view.scores.variability[ordered], posinf=np.finfo(np.float64).max)
    most = ordered[np.argsort(-spread, kind="stable")[:ENDS]]
    kept = np.unique(np.concatenate([ordered[:ENDS], ordered[-ENDS:], most]))
    others = ordered[~np.isin(ordered, kept)]
    evenly = others[np.linspace(0, len(others) - 1, POINTS - len(kept)).round().astype(np.int64)]
    return np.sort(np.concatenate([kept, evenly]))


def hovers(view: RunView, rows: Rows) -> list[str]:
    """Return what hovering over an example shows, escaped, in short lines."""
    found = []
    for row in rows.tolist():
        instruction, response = view.texts[row]
        parts = (("id", view.scores.id[row], 60), ("", instruction, 240), ("answer", response, 240))
        found.append("<br>".join(_wrapped(f"{name}: {text}" if name else text, most) for name, text, most in parts))
    return found


def _wrapped(text: str, most: int) -> str:
    flat = " ".join(text.split())
    short = flat if len(flat) <= most else f"{flat[: most - 4]} ..."
    return "<br>".join(escape(line) for line in textwrap.wrap(short, 70))


def confidence_axis(values: Float64) -> tuple[Float64, dict[str, Any]]:
    """Return heights for confidences, and the axis that labels them with the confidences.

    Perplexities have a long tail: if all confidences are negative and the largest is ten times the smallest in size,
    the axis is logarithmic in minus the confidence, downwards.
    """
    values = np.maximum(values, LEAST / 1e8)
    if not len(values) or not (values.max() < 0 and values.min() < 10 * values.max()):
        return values, {}
    return log_axis(values)


def log_axis(values: Float64) -> tuple[Float64, dict[str, Any]]:
    """Return the heights of negative values on an axis logarithmic in their size, downwards, and its ticks."""
    sizes = -values
    low, high = math.floor(math.log10(sizes.min())), math.ceil(math.log10(sizes.max()))
    stride = max(1, (high - low) // 8)
    powers = range(low, high + 1, stride)
    marks = [f * 10.0**p for p in powers for f in ((1, 2, 5) if high - low <= 3 else (1,))]
    marks = [m for m in marks if sizes.min() * 0.9 <= m <= sizes.max() * 1.1]
    ticks = {"tickvals": [-math.log10(m) for m in marks], "ticktext": [short(-m) for m in marks]}
    return -np.log10(sizes), ticks


def data_map(view: RunView, rows: Rows) -> go.Figure | None:
    """Variability against confidence of these rows, coloured by correctness (a data map, arXiv 2009.10795)."""
    if not len(rows):
        return None
    heights, axis = confidence_axis(view.scores.confidence[rows])
    spread = view.scores.variability[rows]
    positive = spread[np.isfinite(spread) & (spread > 0)]
    log = len(positive) > 0  # with one checkpoint nothing varies
    median = float(np.median(view.scores.confidence[view.by_confidence]))  # of all examples
    at = -math.log10(-median) if axis else median
    dashed = {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": at,
        "y1": at,
        "line": {"dash": "dash", "width": 1},
    }
    correct = correctness(view)[rows] if view.dynamics is not None else np.full(len(rows), np.nan)
    points = go.Scatter(
        x=np.clip(spread, positive.min() / 2, 1e300) if log else spread,
        y=heights,
        mode="markers",
        text=hovers(view, rows),
        customdata=[
            f"confidence {short(c)}, variability {v:,.3g}" + ("" if np.isnan(k) else f", correct {k:.0%}")
            for c, v, k in zip(view.scores.confidence[rows], spread, correct, strict=True)
        ],
        hovertemplate="%{customdata}<br>%{text}<extra></extra>",
        marker={
            "color": None if np.isnan(correct).all() else correct,
            "colorscale": CORRECT,
            "size": 5,
            "opacity": 0.75,
            "colorbar": {"title": {"text": "correct", "side": "right"}, "tickformat": ".0%", "thickness": 12},
        },
    )
    return figure(
        points,
        x=f"variability (standard deviation of the perplexity over the checkpoints{', log' * log})",
        y="confidence" + (" (log)" if axis else ""),
        xaxis={"type": "log", "exponentformat": "power"} if log else {},
        yaxis=axis,
        shapes=[dashed] if view.split is not None else [],
        hovermode="closest",
    )


def histogram(view: RunView, panel: str) -> go.Figure | None:
    """Confidence by group (`groups`) or by label (`labels`, Figure 3), from confidence/histogram.json."""
    if not view.has("confidence", "histogram.json"):
        return None
    counted = read_json(view.path / "confidence" / "histogram.json")
    if panel not in counted["panels"]:
        return None
    edges = np.asarray(counted["edges"])
    middles, logarithmic = (edges[1:] + edges[:-1]) / 2, counted["scale"] == "log"
    if logarithmic:
        middles = -np.sqrt(edges[1:] * edges[:-1])
    x, axis = log_axis(middles) if logarithmic else (middles, {})
    bars = [
        go.Bar(
            x=x,
            y=counts,
            name=escape(name) or "(empty)",
            marker={"color": GROUPS[number % len(GROUPS)], "line": {"width": 0}},
            opacity=0.65,
            customdata=[f"{short(a)} to {short(b)}" for a, b in itertools.pairwise(edges)],
            hovertemplate="%{customdata}: %{y} examples<extra>%{fullData.name}</extra>",
        )
        for number, (name, counts) in enumerate(counted["panels"][panel].items())
    ]
    scale = "confidence (log)" if logarithmic else "confidence"
    return figure(*bars, x=scale, y="examples", xaxis=axis, barmode="overlay", bargap=0)


def hidden_map(view: RunView, rows: Rows, places: Float64, ends: int) -> go.Figure:
    """The map of hidden states, both ends coloured (Figure 1).

    rows    i64[K], the `ends` least confident ones first
    places  f64[K, 2]
    """
    names = (f"{ends} least confident", f"{len(rows) - ends} most confident")
    traces = []
    for name, colour, part in zip(names, (GROUPS[1], GROUPS[0]), (slice(ends), slice(ends, None)), strict=True):
        points = places[part]
        traces.append(
            go.Scatter(
                x=points[:, 0],
                y=points[:, 1],
                name=name,
                mode="markers",
                marker={"color": colour, "size": 6, "opacity": 0.75},
                text=hovers(view, rows[part]),
                customdata=[short(c) for c in view.scores.confidence[rows[part]]],
                hovertemplate="confidence %{customdata}<br>%{text}<extra></extra>",
            )
        )
    bare = {"showticklabels": False, "zeroline": False}
    return figure(*traces, x="t-SNE 1", y="t-SNE 2", xaxis=bare, yaxis=bare, hovermode="closest")


def topics(found: Sequence[Topic]) -> go.Figure | None:
    """Share of each topic at both ends."""
    if not found:
        return None
    words = [escape(topic.words) for topic in found]
    bars = [
        go.Bar(x=[getattr(t, end) for t in found], y=words, name=name, orientation="h", marker={"color": colour})
        for end, name, colour in (
            ("unconfident", "least confident", GROUPS[1]),
            ("confident", "most confident", GROUPS[0]),
        )
    ]
    return figure(
        *bars,
        x="share of the instructions",
        y="",
        xaxis={"tickformat": ".0%"},
        yaxis={"automargin": True},
        legend={"traceorder": "reversed"},
    )


def reliability(view: RunView) -> go.Figure | None:
    """Share of correct tokens against the probability of the most likely token, on the held-out rows."""
    traces = []
    for stage, name in ARMS.items():
        if view.has(stage, "calibration.json"):
            bins = read_json(view.path / stage / "calibration.json")["reliability"]
            x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            line = {"color": COLOURS[stage], "width": 2}
            traces.append(go.Scatter(x=x, y=y, name=name, mode="lines+markers", line=line))
    if not traces:
        return None
    ideal = {"color": COLOURS["base"], "dash": "dash", "width": 1}
    traces.append(go.Scatter(x=[0, 1], y=[0, 1], name="calibrated", mode="lines", line=ideal, hoverinfo="skip"))
    unit = {"range": [0, 1]}
    return figure(*traces, x="probability of the most likely token", y="share correct", xaxis=unit, yaxis=unit)


def before_and_after(view: RunView) -> go.Figure | None:
    """NLL per token of the sample of training rows under the base model and the trained ones."""
    values = {}
    for stage, name in {"base": "base model", **ARMS}.items():
        if view.has(stage, SAMPLE):
            found = read_dynamics(view.path / stage / SAMPLE)
            values[stage, name] = found.nll_sum[:, -1] / found.n_tokens
    if len(values) < 2:
        return None
    boxes = [
        go.Box(y=nll, name=name, marker={"color": COLOURS[stage], "size": 3}, boxpoints="outliers")
        for (stage, name), nll in values.items()
    ]
    return figure(*boxes, x="", y="NLL per token of each example (nats)", showlegend=False)
