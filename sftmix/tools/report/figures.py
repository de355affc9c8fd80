"""The parts that all figures share: plotly without its template, whose colours the page sets; names and colours."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

COLOURS = {"train": "#1b9e77", "baseline": "#e6930f", "reference": "#8a8f98", "base": "#8a8f98"}
"""Stage -> colour."""
MIXUP_COLOUR = "#9a6fd0"
GROUPS = ("#3f8fd2", "#e0603a", "#4fa64f", "#9a6fd0", "#b8860b", "#2a9d8f")
"""Colours of groups, labels and variants, the most confident group first; after the last, they start again."""


def figure(*traces: Any, x: str, y: str, **layout: Any) -> go.Figure:
    """Return a figure with titled axes and without plotly's template, whose colours the page sets."""
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for name in ("xaxis", "yaxis"):
        axes[name] |= layout.pop(name, {})
    return go.Figure(data=traces, layout={"template": go.layout.Template(), **axes, **layout})
