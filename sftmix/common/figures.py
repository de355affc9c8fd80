"""Figures: numbers in nested mappings by dotted names, their unit, counts in words, and Markdown tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (dotted name, number) for every number in nested mappings; NaN for null."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is None:
            yield f"{prefix}{key}", float("nan")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


def unit_of(metric: str) -> str:
    """Return the unit of a figure of a run's summary and which way is better, in words; "" for one without a unit."""
    of_held_out = metric in ("eval_nll_after", "eval_nll_best", "eval_nll_before")
    return "nats per response token of the held-out rows; lower is better" if of_held_out else ""


def short(value: float, *, digits: int = 4) -> str:
    """Return a number with so many digits, with all of the whole ones below ten million: -0.312, -40.2, -167,800."""
    return f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e7 else f"{value:,.{digits}g}"


def counted(n: int, noun: str) -> str:
    """Return `1 step`, `2 steps` or `1,000 steps`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of rows, the head first, its columns aligned for people who read the text."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
