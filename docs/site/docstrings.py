"""Our plain docstrings as Markdown, for the pages under docs/api: the griffe extension that mkdocs.yml names.

Docstrings explain names in lines of `name  meaning`, two spaces between them; these become a table. Indented blocks are
code in Markdown already.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"(?P<name>\S.*?) {2,}(?P<meaning>\S.*)")


class PlainDocstrings(griffe.Extension):
    """Docstrings of everything that is documented, as Markdown."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return the text with its `name  meaning` lines as tables; a line that is indented deeper continues the entry."""
    lines: list[str] = []
    table: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        entry = ENTRY.fullmatch(line)
        if entry:
            table.append([entry["name"], entry["meaning"]])
        elif table and line.startswith(" "):
            table[-1][1] += " " + line.strip()
        else:
            lines += _table(table)
            table = []
            lines.append(line)
    return "\n".join(lines)


def _table(entries: list[list[str]]) -> list[str]:
    if not entries:
        return []
    rows = ["| `{}` | {} |".format(*(cell.replace("|", "\\|") for cell in entry)) for entry in entries]
    return ["", "| | |", "|---|---|", *rows, ""]
