"""The histogram of confidence, by group and by label, as counts; `sftmix report` draws it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sftmix.components.confidence import is_measured
from sftmix.types import Float64

BINS = 40


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
    low, high = np.quantile(pooled, [0.005, 0.995])
    logarithmic = bool(high > low and pooled.max() < 0 and pooled.min() < 10 * pooled.max())
    if logarithmic:
        edges = -np.geomspace(-low, -high, BINS + 1)
    else:
        edges = np.linspace(low, high, BINS + 1) if high > low else low + np.linspace(-0.5, 0.5, BINS + 1)
    counts = {p: {s: _counts(v, edges) for s, v in series.items()} for p, series in finite.items()}
    return {"scale": "log" if logarithmic else "linear", "edges": edges.tolist(), "panels": counts}


def _counts(values: Float64, edges: Float64) -> list[int]:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()
