"""The table of finished cells: a plain value that table.json holds, and that the other files show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import sftmix
from sftmix.common.files import write_json, write_text
from sftmix.pipeline.directory import differences
from sftmix.tools.compare.cells import CellResult
from sftmix.tools.compare.markdown import markdown
from sftmix.tools.compare.plan import Comparison
from sftmix.tools.compare.statistics import (
    ALPHA,
    MIN_SEEDS,
    holm,
    interval,
    mean_sd,
    per_example,
    sign_flip,
)
from sftmix.types import Float64

RATIOS = {"eval_nll_after": "nll_sum", "eval_accuracy": "n_correct", "calibration.brier": "brier_sum"}
"""Metrics that are a sum over examples / the number of response tokens, with the numerator's column of eval.parquet."""


def build_table(comparison: Comparison, results: Sequence[CellResult]) -> dict[str, Any]:
    """Return the table of the finished cells; `complete` is True if these are all.

    Only a complete table has contrasts: testing a part of the seeds would be one of many looks.
    """
    from sftmix.measure.summary import git_revision

    complete = len(results) == len(comparison.cells)
    by_variant = {name: [r for r in results if r.cell.variant == name] for name in comparison.variants}
    contrasts = [_contrast(comparison.options.metric, by_variant, pair) for pair in comparison.contrasts if complete]
    # Count all planned contrasts: one that could not be measured makes the others no more significant.
    adjusted = holm([1.0 if c["p"] is None else c["p"] for c in contrasts])
    for contrast, p_holm in zip(contrasts, adjusted, strict=True):
        contrast["p_holm"] = None if contrast["p"] is None else p_holm
        contrast["verdict"] = "different" if p_holm <= ALPHA else "no difference shown"
        if len(contrast["seeds"]) < MIN_SEEDS:
            contrast["verdict"] = f"not tested: {len(contrast['seeds'])} of at least {MIN_SEEDS} seeds"
    return {
        "complete": complete,
        "runs_done": len(results),
        "runs": len(comparison.cells),
        "metric": comparison.options.metric,
        "baseline": comparison.baseline,
        "variants": {name: _variant(comparison, name, by_variant[name]) for name in by_variant},
        "contrasts": contrasts,
        "options": asdict(comparison.options),
        "seed": comparison.variants[comparison.baseline].seed,
        "versions": {"sftmix": sftmix.__version__, "git_revision": git_revision()},
        "trained_by": sorted({r.revision for r in results} - {""}),
    }


def write_table(directory: Path, table: dict[str, Any]) -> dict[str, Any]:
    """Write table.json, table.md, and cells.csv with a row for each run; return the table."""
    import pandas as pd

    write_json(directory / "table.json", table)
    write_text(directory / "table.md", markdown(table))
    rows = []
    for name, variant in table["variants"].items():
        rows += [{"variant": name, "seed": r["seed"], "run": r["run"], **r["metrics"]} for r in variant["runs"]]
    write_text(directory / "cells.csv", pd.DataFrame(rows).to_csv(index=False))
    return table


def _variant(comparison: Comparison, name: str, results: Sequence[CellResult]) -> dict[str, Any]:
    figures = {}
    for metric in dict.fromkeys(metric for result in results for metric in result.metrics):
        values = [r.metrics[metric] for r in results if metric in r.metrics]
        mean, sd = mean_sd(values)
        figures[metric] = {"seeds": len(values), "mean": mean, "sd": sd}
    runs = [{"seed": r.cell.seed, "run": r.cell.name, "metrics": dict(r.metrics)} for r in results]
    no_value = [r.cell.seed for r in results if comparison.options.metric not in r.metrics]
    return {"options": comparison.options_of(name), "metrics": figures, "no_value": no_value, "runs": runs}


def _contrast(metric: str, by_variant: Mapping[str, list[CellResult]], pair: tuple[str, str]) -> dict[str, Any]:
    """Return the figures of a contrast; None for what too few seeds do not give."""
    ours, theirs = ({r.cell.seed: r for r in by_variant[name]} for name in pair)
    both = [(ours[seed], theirs[seed]) for seed in ours]
    changes = [line for a, b in both for line in differences(a.inputs, b.inputs)]
    measured = [(a, b) for a, b in both if metric in a.metrics and metric in b.metrics]
    values = [a.metrics[metric] - b.metrics[metric] for a, b in measured]
    mean, sd = mean_sd(values) if values else (None, None)
    of_examples = _differences(measured, metric) if values and metric in RATIOS else None
    over = [*["seeds"] * (len(values) > 1), *["examples"] * (of_examples is not None)]
    return {
        "ours": pair[0],
        "theirs": pair[1],
        "seeds": [a.cell.seed for a, _ in measured],
        "inputs_that_differ": sorted({line.partition(": ")[0] for line in changes}),
        "differences": values,
        "mean": mean,
        "sd": sd,
        "p": None if sd is None else sign_flip(values),
        "interval": interval(values if of_examples is None else of_examples) if over else None,
        "interval_over": " and ".join(over) or None,
    }


def _differences(measured: Sequence[tuple[CellResult, CellResult]], metric: str) -> Float64 | None:
    """Return f64[S, N], the differences of the examples; None without per-example files of the same held-out rows."""
    import pandas as pd

    files = [r.cell.path / "train" / "eval.parquet" for pair in measured for r in pair]
    if not all(file.exists() for file in files):
        return None
    columns = [RATIOS[metric], "n_tokens"]
    frames = [pd.read_parquet(file).set_index("id").reindex(columns=columns) for file in files]
    table = pd.concat(frames, axis=1).sort_index()
    if table.isna().any(axis=None):  # other rows, or files without the column
        return None
    sums = np.ascontiguousarray(table.to_numpy(np.float64).T).reshape(len(measured), 2, 2, -1)
    ours, theirs = (per_example(sums[:, side, 0], sums[:, side, 1]) for side in (0, 1))
    return ours - theirs
