"""The histogram of confidence, by group and by label: counts in JSON, and an SVG picture without any library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from sftmix.components.confidence import is_measured
from sftmix.types import Float64

BINS = 40

COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#762a83", "#b8860b", "#01665e", "#8e0152", "#555555")
"""Colours of the series; after the last, they start again."""

_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 900, 300, 60, 40, 630, 200


def histogram(panels: Mapping[str, Mapping[str, Float64]]) -> dict[str, Any]:
    """Count every series of every panel in shared bins: {scale, edges, panels: {panel: {series: counts}}}.

    edges has BINS + 1 ascending numbers, every `counts` BINS. Values that are not measured (NaN, LEAST) are left out.
    The bins are equally wide between the 0.5% and the 99.5% quantile, and the first and the last one also hold all
    values beyond.
    `scale` is "log" if all confidences are negative and the largest is ten times the smallest in size, as with
    perplexities: then the bins are equally wide in log(-confidence).
    """
    finite = {p: {s: v[is_measured(v)] for s, v in series.items()} for p, series in panels.items()}
    pooled = np.concatenate([v for series in finite.values() for v in series.values()])
    logarithmic = bool(pooled.max() < 0 and pooled.min() < 10 * pooled.max())
    low, high = np.quantile(pooled, [0.005, 0.995])
    if logarithmic:
        edges = -np.geomspace(-low, -high, BINS + 1)
    else:
        edges = np.linspace(low, high, BINS + 1) if high > low else low + np.linspace(-0.5, 0.5, BINS + 1)
    counts = {p: {s: _counts(v, edges) for s, v in series.items()} for p, series in finite.items()}
    return {"scale": "log" if logarithmic else "linear", "edges": edges.tolist(), "panels": counts}


def _counts(values: Float64, edges: Float64) -> list[int]:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()


def svg(counted: Mapping[str, Any]) -> str:
    """Return a self-contained picture: panels of step curves below each other, each curve as shares of its series."""
    panels = counted["panels"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT * len(panels)}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (name, series) in enumerate(panels.items()):
        parts += [f'<g transform="translate(0 {number * _HEIGHT})">', *_panel(name, series, counted), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _panel(name: str, series: Mapping[str, Sequence[int]], counted: Mapping[str, Any]) -> list[str]:
    shares = {s: np.asarray(c) / max(1, sum(c)) for s, c in series.items()}
    top = max((float(share.max()) for share in shares.values()), default=0.0) or 1.0
    bottom, right = _TOP + _PLOT_HEIGHT, _LEFT + _PLOT_WIDTH
    parts = [f'<text x="{_LEFT}" y="18" font-size="14">confidence by {escape(name.rstrip("s"))}</text>']
    for share in np.linspace(0, top, 5):
        y = bottom - share / top * _PLOT_HEIGHT
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.1%}</text>')
    for place in range(0, BINS + 1, BINS // 8):
        x = _LEFT + place / BINS * _PLOT_WIDTH
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="black"/>')
        edge = counted["edges"][place]
        value = f"{edge:{',.0f' if 1000 <= abs(edge) < 1e7 else '.3g'}}".replace("-", "\N{MINUS SIGN}")
        parts.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{value}</text>')
    parts.append(
        f'<text transform="translate(12 {_TOP + _PLOT_HEIGHT / 2}) rotate(-90)" text-anchor="middle">share</text>'
    )
    note = "confidence" + (", logarithmic axis" if counted["scale"] == "log" else "")
    note += " (the end bins hold what lies beyond)"
    middle = _LEFT + _PLOT_WIDTH / 2
    parts.append(f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">{note}</text>')
    parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="black"/>')
    for number, (label, share) in enumerate(shares.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = _steps(share / top, bottom)
        parts.append(f'<polygon points="{points}" fill="{colour}" fill-opacity="0.25" stroke="{colour}"/>')
        x, y = right + 25, _TOP + 16 * number
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="{y + 9}">{escape(label[:24])} ({sum(series[label]):,})</text>')
    return parts


def _steps(heights: Float64, bottom: float) -> str:
    """Return the outline of the bars, in pixels."""
    x = np.repeat(_LEFT + np.arange(len(heights) + 1) / len(heights) * _PLOT_WIDTH, 2)
    y = bottom - np.concatenate([[0.0], np.repeat(heights, 2), [0.0]]) * _PLOT_HEIGHT
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
