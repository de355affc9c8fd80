"""Results of an evaluation as one table, tasks x models, and the differences between models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftmix.common.files import sha256_json
from sftmix.evaluate.entries import Entry, Score

ORDER = ("base", "baseline", "target")
CONTRASTS = (("target", "base"), ("target", "baseline"))
"""Pairs of models whose difference is told, where both were measured."""


@dataclass(frozen=True)
class Difference:
    """A difference of two models on the same questions.

    value   mean of the differences, in the unit of the metric
    stderr  its standard error over the n questions, paired: sd of the differences / sqrt(n); None for one question
    """

    task: str
    left: str
    right: str
    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Line:
    """A line of the table: a task with its settings. cells: model -> score; cut: model -> prompts cut short."""

    task: str
    settings: Mapping[str, Any]
    cells: Mapping[str, Score]
    cut: Mapping[str, int]
    differences: Sequence[Difference]


def lines_of(entries: Sequence[Entry]) -> list[Line]:
    """Return the lines of all results. Of results that differ in the model's files alone, the newest counts."""
    groups: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in sorted(entries, key=lambda one: one.finished):
        for name in entry.scores:
            groups.setdefault((name, sha256_json([entry.task, entry.settings])), {})[entry.model] = entry
    lines = []
    for (name, _), found in groups.items():
        cells = {model: found[model].scores[name] for model in sorted(found, key=_place)}
        pairs = [(a, b) for a, b in CONTRASTS if a in cells and b in cells]
        differences = [d for a, b in pairs if (d := difference(name, (a, cells[a]), (b, cells[b])))]
        settings = next(iter(found.values())).settings
        lines.append(Line(name, settings, cells, {m: found[m].cut for m in cells}, differences))
    return sorted(lines, key=lambda line: line.task)


def _place(model: str) -> tuple[int, str]:
    return (ORDER.index(model) if model in ORDER else len(ORDER), model)


def difference(task: str, left: tuple[str, Score], right: tuple[str, Score]) -> Difference | None:
    """Return left - right with its paired standard error.

    None if the two did not answer the same questions, or if the metric is not the mean over questions (a perplexity).
    """
    (a, one), (b, other) = left, right
    if not one.questions or one.questions != other.questions or one.metric != other.metric:
        return None
    if not all(math.isclose(np.mean(score.values), score.value, rel_tol=1e-9) for score in (one, other)):
        return None
    each = np.asarray(one.values) - np.asarray(other.values)
    stderr = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    return Difference(task, a, b, float(each.mean()), stderr, len(each))


# --------------------------------------------------------------------------------------------- as text


def table_of(lines: Sequence[Line]) -> list[list[str]]:
    """Return the table as text, its head first: task, metric, then a column for each model, value ± standard error."""
    models = sorted({model for line in lines for model in line.cells}, key=_place)
    rows = [["task", "settings", "metric", "questions", *models]]
    for line in lines:
        score = next(iter(line.cells.values()))
        shown = [_cell(line.cells[model]) if model in line.cells else "" for model in models]
        rows.append([line.task, settings_text(line.settings), score.metric, f"{score.n:,}", *shown])
    return rows


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return the settings that a reader asks for first: shots, limit, seed and template."""
    shots, limit = settings["num_fewshot"], settings["limit"]
    words = [f"{shots}-shot" if shots is not None else "its own shots"]
    words += [f"first {limit}"] if limit is not None else []
    return ", ".join([*words, f"seed {settings['seed']}", *(["chat template"] if settings["chat_template"] else [])])


def sentences_of(lines: Sequence[Line]) -> list[str]:
    """Return the differences in words, and the prompts that did not fit."""
    told = [_told(one) for line in lines for one in line.differences]
    for line in lines:
        for cut in sorted({n for n in line.cut.values() if n}):
            models = ", ".join(model for model, n in line.cut.items() if n == cut)
            told.append(f"{line.task}: {cut} prompts are longer than the context and lost their beginning ({models}).")
    return told


def _told(found: Difference) -> str:
    spread = "" if found.stderr is None else f" ± {found.stderr:.4f}"
    told = f"{found.task}: {found.left} - {found.right} = {found.value:+.4f}{spread} (paired, {found.n:,} questions)"
    if not found.value and not found.stderr:
        return f"{told}: the same on each question."
    if found.stderr is None or abs(found.value) <= 2 * found.stderr:
        return f"{told}: within two standard errors of zero."
    return f"{told}: more than two standard errors from zero."


def markdown(lines: Sequence[Line]) -> str:
    """Return the table and the sentences in Markdown."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table_of(lines)]
    head, *body = rows
    bars = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    return "\n".join([*bars, "", *(f"- {text}" for text in (*sentences_of(lines), NOTE))]) + "\n"


def plain(lines: Sequence[Line]) -> str:
    """Return the table and the sentences for a terminal."""
    rows = table_of(lines)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*drawn, "", *sentences_of(lines), NOTE])


NOTE = "Standard errors are over questions; one training run says nothing of how much another seed would change."


def _cell(score: Score) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
