"""What tools write: numbers of nested mappings by dotted names, Markdown tables, JSON lines, texts of templates."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.disk.files import write_text


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (dotted name, number) for every number in nested mappings; NaN for null."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, int | float | None) and not isinstance(value, bool):  # True is an int in Python
            yield name, float("nan" if value is None else value)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of rows, the head first, its columns aligned for people who read the text."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]  # a bare one would end the cell
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def narrow_tables(rows: Sequence[Sequence[str]], columns: int) -> str:
    """Return the table in parts of at most so many characters a line, below each other, each with the first column.

    A cell is never broken: a part of two columns may be wider.
    """
    widths = [max(map(len, column)) + len(" | ") for column in zip(*rows, strict=True)]
    parts = [[0]]
    for column, width in enumerate(widths[1:], 1):
        if len(parts[-1]) > 1 and sum(widths[other] for other in parts[-1]) + width + 1 > columns:
            parts.append([0])
        parts[-1].append(column)
    return "\n\n".join(markdown_table([[row[column] for column in part] for row in rows]) for part in parts)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def rendered(template: str, **values: Any) -> str:
    """Return the text of a template, ROOM/FILE, with these values; tags that have a line for themselves leave none."""
    import jinja2

    text = (Path(__file__).parents[1] / template).read_text(encoding="utf-8")  # compare/table.md of sftmix/tools
    return jinja2.Template(text, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined).render(values)
