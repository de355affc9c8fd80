"""A forest plot as SVG: a line for each contrast, with its seeds as points, its mean, and its 95% interval."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.evidence.contrasts import in_brackets
from benchmarks.evidence.findings import MARGIN, Finding

WIDTH, LEFT, RIGHT, ROW, TOP, FOOT = 900, 230, 225, 34, 52, 46
INK, GREY, PALE, BAND = "#1b2430", "#7a828c", "#d5dae0", "#e4f0e4"
LOWER, HIGHER = "#1769aa", "#b3541e"
"""Colours of a difference below and above 0."""
FAR = 25
"""Margins beyond which a mean gets an arrow at the edge instead of its place, where the others would be one line."""


class Line(NamedTuple):
    """A line that is no `Finding`: its name, seed -> difference, their mean, and the 95% interval."""

    name: str
    differences: Mapping[int, float]
    mean: float
    interval: Sequence[float] | None


def forest(
    title: str,
    planned: Sequence[Finding | Line],
    others: Sequence[Finding | Line],
    *,
    margin: float = MARGIN,
    unit: str = "nats per token (lower is better for the first)",
) -> str:
    """Return the SVG text: planned contrasts first, below a line the others.

    The grey-green band is the margin of equality.
    """
    rows = [*planned, *others]
    height = TOP + ROW * len(rows) + FOOT
    about = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {WIDTH} {height}",
        "role": "img",
        "aria-labelledby": "title desc",
        "font-family": "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif",
        "font-size": "13",
    }
    root = ET.Element("svg", about)
    ET.SubElement(root, "title", id="title").text = title
    told = "; ".join(f"{row.name}: {row.mean:+.4f}{_interval(row)}" for row in rows)
    ET.SubElement(root, "desc", id="desc").text = f"Paired differences, {unit}. {told}."
    _shape(root, "rect", x=0, y=0, width=WIDTH, height=height, fill="#ffffff")
    _text(root, title, 14, 24, weight="600", size=15)
    scale = _Scale(rows, margin)
    bottom = TOP + ROW * len(rows)
    low, high = scale.at(-margin), scale.at(margin)
    _shape(root, "rect", x=low, y=TOP, width=high - low, height=bottom - TOP, fill=BAND)
    for tick in scale.ticks:
        _line(root, scale.at(tick), TOP, scale.at(tick), bottom, GREY if tick == 0 else PALE)
        _text(root, f"{tick:+.{scale.digits}f}" if tick else "0", scale.at(tick), bottom + 17, anchor="middle")
    legend = f"difference, {unit}; the band is ±{margin}{'; an arrow: beyond the edge' if scale.beyond else ''}"
    _text(root, legend, scale.at((scale.low + scale.high) / 2), bottom + 36, anchor="middle", fill=GREY)
    for k, row in enumerate(rows):
        _draw(root, row, TOP + ROW * k + ROW / 2, scale)
    if planned and others:
        y = TOP + ROW * len(planned)
        _line(root, 14, y, WIDTH - 14, y, GREY, dash="3 3")
    ET.indent(root, " ")
    return ET.tostring(root, encoding="unicode") + "\n"


class _Scale:
    """Nats -> places on the page, with some ticks at round numbers."""

    def __init__(self, rows: Sequence[Finding | Line], margin: float) -> None:
        self.beyond = {row.name for row in rows if abs(row.mean) > FAR * margin}
        values = [-1.2 * margin, 1.2 * margin]
        for row in rows:
            if row.name not in self.beyond:
                values += [*row.differences.values(), *(row.interval or ())]
        low, high = min(values), max(values)
        rough = (high - low) / 6
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
        self.digits = max(0, -math.floor(math.log10(step)))
        self.ticks = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        room = 0.03 * (high - low)
        self.low, self.high = low - room, high + room

    def at(self, value: float) -> float:
        return LEFT + (value - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT)


def _draw(root: ET.Element, row: Finding | Line, y: float, scale: _Scale) -> None:
    colour = LOWER if row.mean < 0 else HIGHER
    _text(root, row.name, 14, y + 4)
    if row.name in scale.beyond:
        edge, tip = (LEFT + 9, LEFT) if row.mean < 0 else (WIDTH - RIGHT - 9, WIDTH - RIGHT)
        _shape(root, "path", d=f"M{edge} {y - 6:.1f}L{tip} {y:.1f}L{edge} {y + 6:.1f}z", fill=colour)
    else:
        _place(root, row, y, scale, colour)
    _text(root, f"{row.mean:+.4f}{_interval(row)}", WIDTH - RIGHT + 8, y + 4)


def _place(root: ET.Element, row: Finding | Line, y: float, scale: _Scale, colour: str) -> None:
    """Draw the seeds, the mean and the interval."""
    count = len(row.differences)
    for k, value in enumerate(row.differences.values()):  # seeds from top to bottom, so that equal ones are seen
        off = (k - (count - 1) / 2) * min(2.0, 18 / max(count, 1))
        _shape(root, "circle", cx=scale.at(value), cy=y + off, r=2.6, fill=colour, **{"fill-opacity": "0.4"})
    x = scale.at(row.mean)
    diamond = f"M{x - 5:.1f} {y:.1f}L{x:.1f} {y - 5:.1f}L{x + 5:.1f} {y:.1f}L{x:.1f} {y + 5:.1f}z"
    _shape(root, "path", d=diamond, fill=colour)
    if row.interval is not None:
        low, high = map(scale.at, row.interval)
        _line(root, low, y, high, y, INK, width=2)
        for end in (low, high):
            _line(root, end, y - 5, end, y + 5, INK, width=2)


def _interval(row: Finding | Line) -> str:
    return "" if row.interval is None else f" {in_brackets(row.interval)}"


def _shape(root: ET.Element, tag: str, **attributes: object) -> None:
    plain = {k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in attributes.items()}
    ET.SubElement(root, tag, plain)


def _line(
    root: ET.Element, x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1, dash: str = ""
) -> None:
    more = {"stroke-dasharray": dash} if dash else {}
    _shape(root, "line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, **{"stroke-width": width, **more})


def _text(
    root: ET.Element,
    words: str,
    x: float,
    y: float,
    *,
    anchor: str = "start",
    weight: str = "400",
    size: int = 13,
    fill: str = INK,
) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "font-weight": weight}
    ET.SubElement(root, "text", {**place, "font-size": str(size), "fill": fill}).text = words
