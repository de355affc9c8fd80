"""The figures of finished cells, and the table made from them: a plain value that JSON, CSV and Markdown show."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import sftmix
from sftmix.compare.plan import Cell, Comparison
from sftmix.compare.statistics import (
    MIN_SEEDS,
    Counts,
    bootstrap_seeds,
    bootstrap_two_level,
    holm,
    mean_sd,
    seeds_needed,
    sign_flip,
    smallest_effect,
    smallest_p,
)

SHOWN = (
    *("eval_nll_after", "eval_nll_best", "eval_nll_before", "eval_accuracy", "eval_exact_match", "calibration"),
    *("mu_effective", "ntp_tokens", "mixup_tokens", "confidence_std", "spearman_confidence_length", "confounds"),
    "stages.train.wall_seconds",
)
"""The figures and groups of figures that are shown unless `metrics` names others; those not there are left out."""

RATIOS = {"eval_nll_after": "nll_sum", "eval_accuracy": "n_correct"}
"""Metrics that are a sum over examples / the number of response tokens, with the numerator's column of eval.parquet."""

_VERSIONS = ("torch", "transformers", "numpy", "scipy")


@dataclass(frozen=True, slots=True)
class CellResult:
    """What a finished cell has to say.

    metrics  every number of its summary.json, nested ones with dots
    adopted  stage -> directory of the stage it was taken from, relative to the cell's stage
    """

    cell: Cell
    metrics: Mapping[str, float]
    adopted: Mapping[str, str]


def result_of(cell: Cell, summary: Mapping[str, Any]) -> CellResult:
    """The result of a cell whose run returned `summary`."""
    from sftmix.artefacts import read_json
    from sftmix.rundir import ADOPTED

    adopted = {path.parent.name: read_json(path)["from"] for path in sorted(cell.path.glob(f"*/{ADOPTED}"))}
    return CellResult(cell, dict(flatten(summary)), adopted)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, number) of every finite number in nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            yield f"{prefix}{key}", float(value)


# -------------------------------------------------------------------------------------------- the table


def build_table(comparison: Comparison, results: Sequence[CellResult]) -> dict[str, Any]:
    """The table of the cells that are done; `complete` says whether these are all."""
    complete = len(results) == len(comparison.cells)
    by_variant = {name: [r for r in results if r.cell.variant == name] for name in comparison.variants}
    names = list(dict.fromkeys(name for r in results for name in r.metrics))
    contrasts = [_contrast(comparison, by_variant, pair, complete) for pair in comparison.contrasts]
    tested = [c for c in contrasts if c["p"] is not None]
    for contrast, adjusted in zip(tested, holm([c["p"] for c in tested]), strict=True):
        contrast["p_holm"] = adjusted
    for contrast in contrasts:
        contrast["verdict"] = _verdict(contrast)
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
    }


def _variant(
    comparison: Comparison, name: str, own: Sequence[CellResult], base: Sequence[CellResult]
) -> dict[str, Any]:
    figures = {}
    for metric in dict.fromkeys(metric for result in own for metric in result.metrics):
        values = [r.metrics[metric] for r in own if metric in r.metrics]
        mean, sd = mean_sd(values)
        figures[metric] = {"seeds": len(values), "mean": mean, "sd": sd}
        differences = _differences(own, base, metric)
        if differences and name != comparison.baseline:
            off, spread = mean_sd(list(differences.values()))
            figures[metric] |= {"difference": off, "difference_sd": spread}
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
    return {"options": comparison.options_of(name), "metrics": figures, "runs": runs}


def _differences(ours: Sequence[CellResult], theirs: Sequence[CellResult], metric: str) -> dict[int, float]:
    """Seed -> ours - theirs, of the seeds that both have."""
    a, b = ({r.cell.seed: r.metrics[metric] for r in side if metric in r.metrics} for side in (ours, theirs))
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def _contrast(
    comparison: Comparison, by_variant: Mapping[str, list[CellResult]], pair: tuple[str, str], complete: bool
) -> dict[str, Any]:
    ours, theirs = (by_variant[name] for name in pair)
    metric = comparison.options.metric
    differences = _differences(ours, theirs, metric)
    found: dict[str, Any] = {"ours": pair[0], "theirs": pair[1], "seeds": list(differences)}
    found |= {"differences": list(differences.values()), "p": None, "p_holm": None, "mean": None, "sd": None}
    found |= {"interval": None, "interval_over": None, "smallest_effect": None, "smallest_p": None}
    if not differences:
        return found
    values, n = list(differences.values()), len(differences)
    mean, sd = mean_sd(values)
    found |= {"mean": mean, "sd": sd, "smallest_p": smallest_p(n)}
    if sd is not None:
        found |= {"p": sign_flip(values), "smallest_effect": smallest_effect(sd, n)}
    if complete:
        counts = _counts(ours, theirs, metric)
        if counts is not None:
            over = "seeds and examples" if n > 1 else "examples"
            found |= {"interval": bootstrap_two_level(*counts), "interval_over": over}
        elif sd is not None:
            found |= {"interval": bootstrap_seeds(values), "interval_over": "seeds"}
    return found


def _verdict(contrast: Mapping[str, Any]) -> str:
    n = len(contrast["seeds"])
    if n < 2:
        return "one seed: no spread, no test" if n else "nothing to compare yet"
    if n < MIN_SEEDS:
        return f"not tested: with {n} seeds no p is below {smallest_p(n):.2g}"
    return "different" if contrast["p_holm"] <= 0.05 else "no difference shown"


def _counts(ours: Sequence[CellResult], theirs: Sequence[CellResult], metric: str) -> tuple[Counts, Counts] | None:
    """The metric's sums per example on both sides; None without per-example files of the same held-out rows."""
    if metric not in RATIOS:
        return None
    shared = {r.cell.seed for r in ours} & {r.cell.seed for r in theirs}
    sides, rows = [], None
    for side in (ours, theirs):
        tables = [_held_out(r.cell.path / "train" / "eval.parquet") for r in side if r.cell.seed in shared]
        for found in tables:
            if found is None or (rows is not None and set(found) != rows):
                return None
            rows = set(found)
        columns = [[found[i] for i in sorted(found)] for found in tables if found]
        values = np.array(columns, dtype=np.float64)  # [S, N, 3]
        at = list(_COLUMNS).index(RATIOS[metric])
        sides.append(Counts(numerator=values[:, :, at], denominator=values[:, :, _COLUMNS.index("n_tokens")]))
    return sides[0], sides[1]


_COLUMNS = ("nll_sum", "n_tokens", "n_correct")


def _held_out(path: Path) -> dict[str, tuple[float, ...]] | None:
    """Example id -> its nll_sum, n_tokens, n_correct; None where the run wrote no such file."""
    if not path.exists():
        return None
    import pyarrow.parquet as pq

    found = pq.read_table(path, columns=["id", *_COLUMNS]).to_pydict()
    return dict(zip(found["id"], zip(*(found[c] for c in _COLUMNS), strict=True), strict=True))


def _shown_metrics(chosen: list[str] | None, there: Sequence[str], metric: str) -> list[str]:
    """The metric of the table, then those chosen; a group stands for its members, an unknown name for itself."""
    found = [metric]
    for name in SHOWN if chosen is None else chosen:
        members = [m for m in there if m == name or m.startswith(f"{name}.")]
        found += members or ([] if chosen is None else [name])
    return list(dict.fromkeys(found))


def _versions() -> dict[str, str | None]:
    from sftmix.summary import git_revision

    found = {"sftmix": sftmix.__version__, "git_revision": git_revision(), "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in _VERSIONS}


# ---------------------------------------------------------------------------------------------- files


def write_tables(directory: Path, table: Mapping[str, Any], results: Sequence[CellResult]) -> None:
    """Write table.json, table.csv, cells.csv and table.md, each in one step."""
    from sftmix.artefacts import write_json, write_text
    from sftmix.compare.markdown import markdown

    write_json(directory / "table.json", table)
    write_text(directory / "table.csv", _csv(_metric_rows(table)))
    write_text(directory / "cells.csv", _csv(_cell_rows(table, results)))
    write_text(directory / "table.md", markdown(table))


def _metric_rows(table: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    columns = ("seeds", "mean", "sd", "difference", "difference_sd")
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


def _csv(rows: Iterator[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)  # None is an empty cell
    return text.getvalue()
