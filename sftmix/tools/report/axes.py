"""Axes of pictures: ticks of logarithms, and the places of values that would empty a picture."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sftmix.types import Float64
from sftmix.words.shown import short

MOST_TICKS = 6
"""Ticks of a logarithmic axis, whose numbers are then apart on a phone as well."""
REACH = 0.25
"""How far beyond the first and the last of a hundred values a picture goes, as a share of the way between them."""


def log_ticks(low: float, high: float) -> Sequence[float]:
    """Return at most MOST_TICKS numbers from `low` to `high`, both above 0: 1, 2, 5 and 10 times a power of ten.

    If these are too many, 1 and 3 times a power of ten, or the powers alone, or every second or third of them.
    """
    powers = 10.0 ** np.arange(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = np.outer(powers, digits).ravel()
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) <= MOST_TICKS:
            break
    return ticks[:: math.ceil(len(ticks) / MOST_TICKS) or 1].tolist()


def log_axis(places: Float64, sign: str = "") -> dict[str, Any]:
    """Return a logarithmic axis for places above 0; a sign is in front of each number, and reverses the axis."""
    ticks = log_ticks(float(np.nanmin(places)), float(np.nanmax(places)))
    texts = [f"{sign}{short(tick)}" for tick in ticks]
    return {"type": "log", "tickvals": ticks, "ticktext": texts, "autorange": "reversed" if sign else True}


def has_long_tail(confidence: Float64) -> bool:
    """Return True for confidences that a logarithm of minus the confidence shows better, as with perplexities.

    All are negative, and the largest is ten times the smallest in size.
    """
    return bool(confidence.max() < 0 and confidence.min() < 10 * confidence.max())


def without_outliers(values: Float64, log: bool) -> Float64:
    """Return values with the few that would empty a picture moved to its edge; all others are the same numbers."""
    seen = np.log(values) if log else values
    low, high = np.nanpercentile(seen, (1, 99), method="nearest")
    if high <= low:
        return values
    # If all values but one are from 1 to 2, and that one is 1e9, it is drawn at 2.24.
    edges = np.array([low - REACH * (high - low), high + REACH * (high - low)])
    return np.clip(values, *(np.exp(edges) if log else edges))
