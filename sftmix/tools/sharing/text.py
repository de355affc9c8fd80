"""Markdown whose words from data cannot become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def escaped(value: Any) -> str:
    """Return a value as one line of text: no markup, no HTML, no end of a table's cell."""
    line = " ".join(str(value).split())
    return _MARKUP.sub(r"\\\1", html.escape(line, quote=False))


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table, its head first; every cell is escaped."""
    head, *body = [[escaped(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def fenced(text: str) -> str:
    """Return a block of YAML that no line of the text can close."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"
