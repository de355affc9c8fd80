"""Results of an evaluation as one table, tasks x models, and the differences between models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftmix.common.figures import counted
from sftmix.common.files import sha256_json
from sftmix.tools.evaluate.entries import Entry, Score

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
    """A line of the table: a task with its settings. cells: model -> score; cut: model -> prompts cut short.

    filtered  how lm-eval took the answer from the text, for a metric that it gives by several such filters; else empty
    """

    task: str
    settings: Mapping[str, Any]
    cells: Mapping[str, Score]
    cut: Mapping[str, int]
    differences: Sequence[Difference]
    filtered: str = ""


@dataclass(frozen=True)
class Table:
    """The table. left_out: sentences about results that are not in it."""

    lines: Sequence[Line]
    left_out: Sequence[str] = ()


def table_from(entries: Sequence[Entry], measured: Mapping[str, str]) -> Table:
    """Return the table of all results. Of results that differ in the model's files alone, the newest counts.

    measured  name -> fingerprint of the models as they are now; results of other weights under these names are left out
    """
    old = [entry for entry in entries if measured.get(entry.model, entry.identity) != entry.identity]
    groups: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in sorted((one for one in entries if one not in old), key=lambda one: one.finished):
        for name in entry.scores:
            groups.setdefault((name, _settings_key(entry)), {})[entry.model] = entry
    lines = [_line(name, found) for (name, _), found in groups.items()]
    current = {(key, model) for (_, key), found in groups.items() for model in found}
    gone = {(entry.task, entry.model): None for entry in old if (_settings_key(entry), entry.model) not in current}
    left_out = [
        f"{task}: what was measured of {model} is left out: it was trained again since, and the task was not measured "
        "again with these settings."
        for task, model in gone
    ]
    return Table(sorted(lines, key=lambda line: line.task), left_out)


def _settings_key(entry: Entry) -> str:
    return sha256_json([entry.task, entry.settings])


def _line(name: str, found: Mapping[str, Entry]) -> Line:
    cells = {model: found[model].scores[name] for model in sorted(found, key=_place)}
    pairs = [(a, b) for a, b in CONTRASTS if a in cells and b in cells]
    differences = [d for a, b in pairs if (d := difference(name, (a, cells[a]), (b, cells[b])))]
    first = next(iter(found.values()))
    cut = {m: found[m].cut for m in cells}
    return Line(
        name, first.settings, cells, cut, differences, _filter(first.all.get(name, {}), first.scores[name].metric)
    )


def _filter(values: Mapping[str, Any], metric: str) -> str:
    """Return the filter of the score, which is the first one of its metric, if there are several."""
    filters = [key.removeprefix(f"{metric},") for key in values if key.startswith(f"{metric},")]
    return filters[0] if len(filters) > 1 else ""


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


def table_of(table: Table) -> list[list[str]]:
    """Return the table as text, its head first: task, metric, then a column for each model, value ± standard error."""
    models = sorted({model for line in table.lines for model in line.cells}, key=_place)
    rows = [["task", "settings", "metric", "questions", *models]]
    for line in table.lines:
        score = next(iter(line.cells.values()))
        shown = [_cell(line.cells[model]) if model in line.cells else "" for model in models]
        metric = f"{score.metric} ({line.filtered})" if line.filtered else score.metric
        rows.append([line.task, settings_text(line.settings), metric, f"{score.n:,}", *shown])
    return rows


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return the settings that a reader asks for first: shots, limit, seed and template."""
    shots, limit = settings["num_fewshot"], settings["limit"]
    words = [f"{shots}-shot" if shots is not None else "its own shots"]
    words += [f"first {limit}"] if limit is not None else []
    return ", ".join([*words, f"seed {settings['seed']}", *(["chat template"] if settings["chat_template"] else [])])


def sentences_of(table: Table) -> list[str]:
    """Return the differences in words, the prompts that did not fit, and the results that are not in the table."""
    told = [_told(one) for line in table.lines for one in line.differences]
    for line in table.lines:
        for cut in sorted({n for n in line.cut.values() if n}):
            models = ", ".join(model for model, n in line.cut.items() if n == cut)
            are, their = ("is", "its") if cut == 1 else ("are", "their")
            lost = f"{are} longer than the context and lost {their} beginning"
            told.append(f"{line.task}: {counted(cut, 'prompt')} {lost} ({models}).")
    return [*told, *table.left_out]


def _told(found: Difference) -> str:
    spread = "" if found.stderr is None else f" ± {found.stderr:.4f}"
    told = f"{found.task}: {found.left} - {found.right} = {found.value:+.4f}{spread} (paired, {found.n:,} questions)"
    if not found.value and not found.stderr:
        return f"{told}: the same on each question."
    if found.stderr is None or abs(found.value) <= 2 * found.stderr:
        return f"{told}: within two standard errors of zero."
    return f"{told}: more than two standard errors from zero."


def markdown(table: Table) -> str:
    """Return the table and the sentences in Markdown."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table_of(table)]
    head, *body = rows
    bars = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    return "\n".join([*bars, "", *(f"- {text}" for text in (*sentences_of(table), NOTE))]) + "\n"


def plain(table: Table) -> str:
    """Return the table and the sentences for a terminal."""
    rows = table_of(table)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*drawn, "", *sentences_of(table), NOTE])


NOTE = "Standard errors are over questions; one training run says nothing of how much another seed would change."


def _cell(score: Score) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
