"""The table of all results of a directory: a line for each task with its settings, and paired differences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.disk.files import hashed, read_json, write_json, write_text
from sftmix.disk.hashes import sha256_json
from sftmix.tools.runs.output import markdown_table
from sftmix.tools.runs.read import read_json_if_there

Score = dict[str, Any]
"""A figure of a task with its standard error: see `scores_of`, and `difference`."""
MODELS = ["base", "baseline", "target"]


def write_tables(place: Path, measured: dict[str, str]) -> str:
    """Write table.json and table.md of all results of a directory; return the latter.

    A line is a task with its settings. If results differ in the model's files alone, the newest counts. Under the
    table are the differences of the target to the base and to the baseline.

    measured  model -> its identity now, as also later commands see it; "": another run's may be there. Results of other
              weights under these names are left out
    """
    known = read_json_if_there(place / "table.json").get("identities", {}) | measured
    tables = _tables([entry for entry in _results(place) if known.get(entry["model"]) in (None, entry["identity"])])
    tables["identities"] = known
    text = "\n".join([markdown_table(tables["table"]), "", *(f"- {sentence}" for sentence in tables["sentences"])])
    write_json(place / "table.json", hashed(tables))
    write_text(place / "table.md", text + "\n")
    return text


def results_of(run: Path) -> dict[str, Any] | None:
    """Return what table.json of a run is without the models that were trained again since; None if that is nothing."""
    from sftmix.tools.runs.loaded import weights_of
    from sftmix.tools.runs.models import FinishedModel

    results = _results(run / "evaluation")
    for name, stage in (("target", "train"), ("baseline", "baseline")):
        folder = run.absolute() / stage / "model"
        if any(entry["model"] == name for entry in results) and folder.is_dir():
            weights = weights_of(FinishedModel(name, str(folder), run))
            results = [entry for entry in results if entry["model"] != name or entry["weights"] == weights]
    return _tables(results) if results else None


def _results(place: Path) -> list[dict[str, Any]]:
    """Return all results of a directory, the newest last."""
    # arc_easy.target.3f2a9c0b1d4e.json, and not table.json.
    return sorted(map(read_json, place.glob("*.*.????????????.json")), key=lambda entry: entry["finished"])


def _tables(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the table of results, its sentences, and the differences of the target to the base and the baseline."""
    lines: dict[Any, dict[str, Any]] = {}
    for entry in results:
        name, settings = entry["model"], entry["settings"]
        first = "" if settings["limit"] is None else f"first {settings['limit']}"
        chat = "chat template" * settings["chat_template"]
        dtype = settings["dtype"].removeprefix("auto")
        for task, score in entry["scores"].items():
            words = _shots(score, settings["num_fewshot"]), first, f"seed {settings['seed']}", chat, dtype
            # The hash keeps apart what the words do not say, such as another version of lm-eval.
            line = task, ", ".join(filter(None, words)), sha256_json(settings)
            lines.setdefault(line, {})[name] = score  # the newest is last, and stays
    names = {entry["model"] for entry in results}
    models = [*(name for name in MODELS if name in names), *sorted(names.difference(MODELS))]
    table = [["task", "settings", "metric", "questions", *models]]
    differences = []
    sentences = []
    for (task, settings, _), scores in sorted(lines.items()):
        any_score = next(iter(scores.values()))
        cells = [_figure(scores[model], ".4f") if model in scores else "" for model in models]  # "0.5000 ± 0.0158"
        table.append([task, settings, any_score["metric"], f"{any_score['n']:,}", *cells])
        for other in ("base", "baseline"):
            if "target" in scores and other in scores and (figures := difference(scores["target"], scores[other])):
                differences.append({"task": task, "left": "target", "right": other, **figures})
                paired = f"{_figure(figures, '+.4f')} (paired, {figures['n']:,} questions)"
                sentences.append(f"{task}: target - {other} = {paired}")
    sentences.append(
        "Standard errors are over questions; one training run says nothing of how much another seed would change."
    )
    return {"table": table, "sentences": sentences, "differences": differences}


def _shots(score: Score, asked: int | None) -> str:
    """Say how many shots a score had: a task whose file says 0 has none, whatever is asked for."""
    if (had := score.get("shots", asked)) is not None:
        return f"{had}-shot"
    return "its own shots" if asked is None else f"up to {asked}-shot"  # a group of tasks with unlike shots


def difference(left: Score, right: Score) -> Score | None:
    """Return left - right of two scores: value, its stderr, and n.

    The error is paired: sd of the differences of single questions / sqrt(n); None for one question. There is no
    difference if the two did not answer the same questions, or if the metric is not their mean (a perplexity).
    """
    if not left["questions"] or any(left[key] != right[key] for key in ("questions", "metric")):
        return None
    # A perplexity is exp of a mean.
    if not np.isclose(np.mean(left["values"]), left["value"], rtol=1e-9, atol=0):
        return None
    from scipy.stats import sem

    each = np.subtract(left["values"], right["values"])
    return {"value": float(each.mean()), "stderr": float(sem(each)) if len(each) > 1 else None, "n": len(each)}


def _figure(figure: Score, form: str) -> str:
    return f"{figure['value']:{form}}" + ("" if figure["stderr"] is None else f" ± {figure['stderr']:.4f}")
