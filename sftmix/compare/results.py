"""The figures of finished cells, and the table made from them: a plain value that JSON, CSV and Markdown show."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import sftmix
from sftmix.common.errors import ConfigError, nearest
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

RATIOS = {"eval_nll_after": "nll_sum", "eval_accuracy": "n_correct", "calibration.brier": "brier_sum"}
"""Metrics that are a sum over examples / the number of response tokens, with the numerator's column of eval.parquet."""

RELATIVE = ("confidence_std.after", "confidence_std.log_after")
"""Metrics whose ratio to the baseline's is shown: the paper reports that SFTMix narrows confidence by 7%."""

_VERSIONS = ("torch", "transformers", "numpy", "scipy")


@dataclass(frozen=True, slots=True)
class CellResult:
    """What a finished cell has to say.

    metrics   every finite number of its summary.json, nested ones with dots
    no_value  names of its figures that are null or not finite
    adopted   stage -> directory of the stage it was taken from, relative to the cell's stage
    revision  version and git revision that trained the target
    same      what runs of a variant may have in common: rows, eval and reference, as their stages' inputs tell it
    """

    cell: Cell
    metrics: Mapping[str, float]
    no_value: Sequence[str]
    adopted: Mapping[str, str]
    revision: str
    same: Mapping[str, Any]


def result_of(cell: Cell, summary: Mapping[str, Any]) -> CellResult:
    """The result of a cell whose run returned `summary`."""
    from sftmix.common.files import read_json
    from sftmix.pipeline.directory import ADOPTED

    adopted = {path.parent.name: read_json(path)["from"] for path in sorted(cell.path.glob(f"*/{ADOPTED}"))}
    figures = dict(flatten(summary))
    metrics = {name: value for name, value in figures.items() if np.isfinite(value)}
    inputs = {s: read_json(p) for s in ("reference", "train") if (p := cell.path / s / "inputs.json").exists()}
    same = {key: inputs.get("train", {}).get(key) for key in ("data", "eval")}
    same["reference"] = inputs.get("reference")
    revision = " ".join(filter(None, (summary["version"], summary["git_revision"])))
    return CellResult(cell, metrics, [n for n in figures if n not in metrics], adopted, revision, same)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, number) of every number in nested mappings; NaN where the value is null."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is None:
            yield f"{prefix}{key}", float("nan")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


_ONLY_WITH_PAIRS = ("confidence", "spearman_confidence_length", "confounds", "stages")
"""Groups of figures that runs without a split lack in part: the first of several variants does not decide on these."""


def refuse_unknown_metrics(comparison: Comparison, results: Sequence[CellResult]) -> None:
    """ConfigError for a name in `metric` or `metrics` that is no figure of the runs, as soon as that can be told.

    That is after the first run; for figures of the split after the first run of every variant.
    """
    options = comparison.options
    there = list(dict.fromkeys(name for r in results for name in (*r.metrics, *r.no_value)))
    for key, name in [("metric", options.metric), *(("metrics", name) for name in options.metrics or ())]:
        known = name in there or (key == "metrics" and any(m.startswith(f"{name}.") for m in there))
        early = len(results) < len(comparison.variants) and name.partition(".")[0] in _ONLY_WITH_PAIRS
        if not known and not early:
            siblings = [m for m in there if m.rpartition(".")[0] == name.rpartition(".")[0]]
            guess = nearest(name, siblings) or nearest(name, there)
            raise ConfigError(
                f"{key} names {name!r}, which is no figure of a run's summary.json ({results[-1].cell.path})."
                f"{guess} Figures there: {', '.join(siblings or there)}"
            )


# -------------------------------------------------------------------------------------------- the table


def build_table(comparison: Comparison, results: Sequence[CellResult]) -> dict[str, Any]:
    """The table of the cells that are done; `complete` says whether these are all."""
    complete = len(results) == len(comparison.cells)
    by_variant = {name: [r for r in results if r.cell.variant == name] for name in comparison.variants}
    names = list(dict.fromkeys(name for r in results for name in r.metrics))
    contrasts = [_contrast(comparison, by_variant, pair, complete) for pair in comparison.contrasts]
    # Over all that were planned: one that could not be measured makes the others no more significant.
    adjusted = holm([1.0 if c["p"] is None else c["p"] for c in contrasts])
    for contrast, p_holm in zip(contrasts, adjusted, strict=True):
        contrast["p_holm"] = None if contrast["p"] is None else p_holm
        contrast["verdict"] = _verdict(contrast, complete)
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
        "trained_by": sorted({r.revision for r in results}),
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
            if metric in RELATIVE:  # the mean of each seed's ratio, like the difference paired by seed
                figures[metric]["relative"] = mean_sd(_relative(own, differences, metric))[0]
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


def _differences(ours: Sequence[CellResult], theirs: Sequence[CellResult], metric: str) -> dict[int, float]:
    """Seed -> ours - theirs, of the seeds that both have."""
    a, b = ({r.cell.seed: r.metrics[metric] for r in side if metric in r.metrics} for side in (ours, theirs))
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def _relative(ours: Sequence[CellResult], differences: Mapping[int, float], metric: str) -> list[float]:
    """ours / theirs - 1 of each seed, of positive figures."""
    values = {r.cell.seed: r.metrics[metric] for r in ours if r.cell.seed in differences}
    return [values[seed] / (values[seed] - off) - 1 for seed, off in differences.items()]


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
        counts = _counts(ours, theirs, metric, set(differences))
        if counts is not None:
            over = "seeds and examples" if n > 1 else "examples"
            found |= {"interval": bootstrap_two_level(*counts), "interval_over": over}
        elif sd is not None:
            found |= {"interval": bootstrap_seeds(values), "interval_over": "seeds"}
    return found


def _verdict(contrast: Mapping[str, Any], complete: bool) -> str:
    n = len(contrast["seeds"])
    if not n:
        return "not measured" if complete else "nothing to compare yet"
    if n < 2:
        return "one seed: no spread, no test"
    if n < MIN_SEEDS:
        return f"not tested: with {n} seeds no p is below {smallest_p(n):.2g}"
    if not complete:
        return "wait for the end"  # a verdict on a part of the seeds would be one of many looks
    return "different" if contrast["p_holm"] <= 0.05 else "no difference shown"


def _counts(
    ours: Sequence[CellResult], theirs: Sequence[CellResult], metric: str, seeds: Container[int]
) -> tuple[Counts, Counts] | None:
    """The metric's sums per example on both sides; None without per-example files of the same held-out rows.

    seeds  those that have the metric on both sides
    """
    if metric not in RATIOS:
        return None
    sides, rows = [], None
    for side in (ours, theirs):
        paths = [r.cell.path / "train" / "eval.parquet" for r in side if r.cell.seed in seeds]
        tables = [_held_out(path, RATIOS[metric]) for path in paths]
        for found in tables:
            if found is None or (rows is not None and set(found) != rows):
                return None
            rows = set(found)
        columns = [[found[i] for i in sorted(found)] for found in tables if found]
        values = np.array(columns, dtype=np.float64)  # [S, N, 2]
        sides.append(Counts(numerator=values[:, :, 0], denominator=values[:, :, 1]))
    return sides[0], sides[1]


def _held_out(path: Path, numerator: str) -> dict[str, tuple[float, ...]] | None:
    """Example id -> that column and n_tokens; None where the run wrote no such file."""
    if not path.exists():
        return None
    import pyarrow.parquet as pq

    found = pq.read_table(path, columns=["id", numerator, "n_tokens"]).to_pydict()
    return dict(zip(found["id"], zip(found[numerator], found["n_tokens"], strict=True), strict=True))


def _shown_metrics(chosen: list[str] | None, there: Sequence[str], metric: str) -> list[str]:
    """The metric of the table, then those chosen; a group stands for its members, an unknown name for itself."""
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
    from sftmix.common.files import write_json, write_text
    from sftmix.compare.markdown import markdown

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


def _csv(rows: Iterator[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)  # None is an empty cell
    return text.getvalue()
