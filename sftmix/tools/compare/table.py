"""The table of finished cells: a plain value that JSON, CSV and Markdown show."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import sftmix
from sftmix.common.files import write_json, write_text
from sftmix.tools.compare.cells import CellResult
from sftmix.tools.compare.contrasts import contrast_of, differences_of, verdict_of
from sftmix.tools.compare.plan import Comparison
from sftmix.tools.compare.statistics import holm, mean_sd, seeds_needed

SHOWN = (
    *("eval_nll_after", "eval_nll_best", "eval_nll_before", "eval_accuracy", "eval_exact_match", "calibration"),
    *("mu_effective", "ntp_tokens", "mixup_tokens", "confidence_std", "confounds"),
    "stages.train.wall_seconds",
)
"""Figures and groups of figures that are shown unless `metrics` names others; missing ones are left out."""

RELATIVE = ("confidence_std.after", "confidence_std.log_after")
"""Metrics whose ratio to the baseline's is shown: the paper reports that SFTMix narrows confidence by 7%."""

_VERSIONS = ("torch", "transformers", "numpy", "scipy")


# -------------------------------------------------------------------------------------------- the table


def build_table(comparison: Comparison, results: Sequence[CellResult]) -> dict[str, Any]:
    """Return the table of the finished cells; `complete` is True if these are all."""
    complete = len(results) == len(comparison.cells)
    by_variant = {name: [r for r in results if r.cell.variant == name] for name in comparison.variants}
    names = list(dict.fromkeys(name for r in results for name in r.metrics))
    contrasts = [contrast_of(comparison, by_variant, pair, complete) for pair in comparison.contrasts]
    # Count all planned contrasts: one that could not be measured makes the others no more significant.
    adjusted = holm([1.0 if c["p"] is None else c["p"] for c in contrasts])
    for contrast, p_holm in zip(contrasts, adjusted, strict=True):
        contrast["p_holm"] = None if contrast["p"] is None else p_holm
        contrast["verdict"] = verdict_of(contrast, complete)
    return {
        "complete": complete,
        "runs_done": len(results),
        "runs": len(comparison.cells),
        "metric": comparison.options.metric,
        "shown": _shown_metrics(comparison.options.metrics, names, comparison.options.metric),
        "baseline": comparison.baseline,
        "seeds_needed": seeds_needed(max(len(contrasts), 1)),
        "variants": {n: _variant(comparison, n, by_variant[n], by_variant[comparison.baseline]) for n in by_variant},
        "contrasts": contrasts,
        "options": asdict(comparison.options),
        "seed": comparison.variants[comparison.baseline].seed,
        "versions": _versions(),
        "trained_by": sorted({r.revision for r in results} - {""}),
    }


def _variant(
    comparison: Comparison, name: str, own: Sequence[CellResult], base: Sequence[CellResult]
) -> dict[str, Any]:
    figures = {}
    for metric in dict.fromkeys(metric for result in own for metric in result.metrics):
        values = [r.metrics[metric] for r in own if metric in r.metrics]
        mean, sd = mean_sd(values)
        figures[metric] = {"seeds": len(values), "mean": mean, "sd": sd}
        differences = differences_of(own, base, metric)
        if differences and name != comparison.baseline:
            off, spread = mean_sd(list(differences.values()))
            figures[metric] |= {"difference": off, "difference_sd": spread}
            # The mean of each seed's ratio, like the difference paired by seed.
            if metric in RELATIVE and (ratios := _relative(own, base, metric)):
                figures[metric]["relative"] = mean_sd(ratios)[0]
    runs = [
        {
            "seed": r.cell.seed,
            "run": r.cell.name,
            "configuration": comparison.hash_of(r.cell),
            "adopted": dict(r.adopted),
            "metrics": dict(r.metrics),
        }
        for r in own
    ]
    return {
        "options": comparison.options_of(name),
        "metrics": figures,
        "no_value": [r.cell.seed for r in own if comparison.options.metric not in r.metrics],
        "same_at_all_seeds": {key: all(r.same[key] == own[0].same[key] for r in own) for key in _SAME if own},
        "runs": runs,
    }


_SAME = ("data", "eval", "reference")


def _relative(ours: Sequence[CellResult], base: Sequence[CellResult], metric: str) -> list[float]:
    """Return ours / theirs - 1 of each seed at which theirs is positive."""
    theirs = {r.cell.seed: r.metrics[metric] for r in base if r.metrics.get(metric, 0) > 0}
    both = [(r.metrics[metric], theirs[r.cell.seed]) for r in ours if metric in r.metrics and r.cell.seed in theirs]
    return [own / other - 1 for own, other in both]


def _shown_metrics(chosen: list[str] | None, there: Sequence[str], metric: str) -> list[str]:
    """Return the table's metric, then the chosen ones; a group stands for its members, an unknown name for itself."""
    found = [metric]
    for name in SHOWN if chosen is None else chosen:
        members = [m for m in there if m == name or m.startswith(f"{name}.")]
        found += members or ([] if chosen is None else [name])
    return list(dict.fromkeys(found))


def _versions() -> dict[str, str | None]:
    from sftmix.measure.summary import git_revision

    found = {"sftmix": sftmix.__version__, "git_revision": git_revision(), "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in _VERSIONS}


# ---------------------------------------------------------------------------------------------- files


def write_tables(directory: Path, table: Mapping[str, Any], results: Sequence[CellResult]) -> None:
    """Write table.json, table.csv, cells.csv and table.md, each in one step."""
    from sftmix.tools.compare.markdown import markdown

    write_json(directory / "table.json", table)
    write_text(directory / "table.csv", _csv(_metric_rows(table)))
    write_text(directory / "cells.csv", _csv(_cell_rows(table, results)))
    write_text(directory / "table.md", markdown(table))


def _metric_rows(table: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    columns = ("seeds", "mean", "sd", "difference", "difference_sd", "relative")
    yield ("variant", "metric", *columns)
    for name, variant in table["variants"].items():
        for metric, figures in variant["metrics"].items():
            yield (name, metric, *(figures.get(column) for column in columns))


def _cell_rows(table: Mapping[str, Any], results: Sequence[CellResult]) -> Iterator[Sequence[Any]]:
    metrics = list(dict.fromkeys(name for r in results for name in r.metrics))
    yield ("variant", "seed", "run", "configuration", *metrics)
    for name, variant in table["variants"].items():
        for run in variant["runs"]:
            figures = (run["metrics"].get(metric) for metric in metrics)
            yield (name, run["seed"], run["run"], run["configuration"], *figures)


def _csv(rows: Iterator[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)  # None is an empty cell
    return text.getvalue()
