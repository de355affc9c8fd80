"""Results of an evaluation on disk, and the table of them: tasks x models, with differences on the same questions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.figures import markdown_table
from sftmix.common.files import read_json, sha256_json, write_json, write_text

FOLDER = "evaluation"
"""Where the results are, in a run directory."""
ORDER = ("base", "baseline", "target")
NOTE = "Standard errors are over questions; one training run says nothing of how much another seed would change."

Entry = dict[str, Any]
"""The result of one task on one model, as its file has it:

task, model, path
identity    fingerprint of the model's files and of its encoder
settings    all that the numbers depend on, but the model: few-shot examples, limit, seed, template, hashes, versions
scores      as `sftmix.tools.evaluate.harness.scores_of` gives them
all         every metric that lm-eval gave, by the name of the task
finished    Unix time, seconds
"""


def entry_file(place: Path, task: str, model: str, identity: str, settings: Mapping[str, Any]) -> Path:
    """Return the file of a result; its name tells the task and the model, and has a hash of the rest."""
    names = [re.sub(r"[^\w.-]+", "-", name).strip("-.") for name in (task, model)]
    return place / "{}.{}.{}.json".format(*names, sha256_json([model, identity, settings])[:12])


def write_tables(place: Path, measured: Mapping[str, str]) -> str:
    """Write table.json and table.md of all results of a directory; return the latter.

    measured  model -> its identity now; results of other weights under these names are left out
    """
    entries = [read_json(file) for file in place.glob("*.*.????????????.json")]
    table, differences = tables_of([e for e in entries if measured.get(e["model"]) in (None, e["identity"])])
    sentences = [
        f"{one['task']}: {one['left']} - {one['right']} = {_figure(one, '+.4f')} (paired, {one['n']:,} questions)"
        for one in differences
    ]
    sentences.append(NOTE)
    text = "\n".join([markdown_table(table), "", *(f"- {sentence}" for sentence in sentences)])
    write_json(place / "table.json", {"table": table, "sentences": sentences, "differences": differences})
    write_text(place / "table.md", text + "\n")
    return text


def tables_of(entries: Sequence[Entry]) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Return the table as text, its head first, and the differences of the target to the base and to the baseline.

    A line is a task with its settings. Of results that differ in the model's files alone, the newest counts.
    """
    lines = dict[tuple[str, str, str], dict[str, Mapping[str, Any]]]()
    for entry in sorted(entries, key=lambda entry: entry["finished"]):
        settings = entry["settings"]
        words = "its own shots" if settings["num_fewshot"] is None else f"{settings['num_fewshot']}-shot"
        words += "" if settings["limit"] is None else f", first {settings['limit']}"
        words += f", seed {settings['seed']}" + (", chat template" if settings["chat_template"] else "")
        for task, score in entry["scores"].items():
            lines.setdefault((task, words, sha256_json(settings)), {})[entry["model"]] = score
    names = {entry["model"] for entry in entries}
    models = [*(name for name in ORDER if name in names), *sorted(names.difference(ORDER))]
    table, differences = [["task", "settings", "metric", "questions", *models]], []
    for (task, words, _), scores in sorted(lines.items()):
        first = next(iter(scores.values()))
        cells = [_figure(scores[model], ".4f") if model in scores else "" for model in models]
        table.append([task, words, first["metric"], f"{first['n']:,}", *cells])
        for other in ("base", "baseline"):
            both = [scores[name] for name in ("target", other) if name in scores]
            figures = difference(*both) if len(both) == 2 else None
            if figures is not None:
                differences.append({"task": task, "left": "target", "right": other, **figures})
    return table, differences


def difference(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return left - right of two scores: value, its stderr, and n.

    The error is paired: sd of the differences of single questions / sqrt(n); None for one question. There is no
    difference if the two did not answer the same questions, or if the metric is not their mean (a perplexity).
    """
    if not left["questions"] or any(left[key] != right[key] for key in ("questions", "metric")):
        return None
    if not all(math.isclose(np.mean(score["values"]), score["value"], rel_tol=1e-9) for score in (left, right)):
        return None
    each = np.asarray(left["values"]) - np.asarray(right["values"])
    stderr = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    return {"value": float(each.mean()), "stderr": stderr, "n": len(each)}


def _figure(figure: Mapping[str, Any], form: str) -> str:
    return f"{figure['value']:{form}}" + ("" if figure["stderr"] is None else f" ± {figure['stderr']:.4f}")
