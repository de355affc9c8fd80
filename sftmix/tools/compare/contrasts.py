"""One contrast of a table: two variants paired by seed, the things both sides share, and the statistics."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.tables import read_eval
from sftmix.tools.compare.cells import CellResult
from sftmix.tools.compare.plan import Comparison
from sftmix.tools.compare.statistics import (
    ALPHA,
    MIN_SEEDS,
    Counts,
    interval_seeds,
    interval_two_level,
    mean_sd,
    sign_flip,
    smallest_effect,
    smallest_p,
)

RATIOS = {"eval_nll_after": "nll_sum", "eval_accuracy": "n_correct", "calibration.brier": "brier_sum"}
"""Metrics that are a sum over examples / the number of response tokens, with the numerator's column of eval.parquet."""


def differences_of(ours: Sequence[CellResult], theirs: Sequence[CellResult], metric: str) -> dict[int, float]:
    """Return seed -> ours - theirs, for the seeds that both have."""
    a, b = ({r.cell.seed: r.metrics[metric] for r in side if metric in r.metrics} for side in (ours, theirs))
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def contrast_of(
    comparison: Comparison, by_variant: Mapping[str, list[CellResult]], pair: tuple[str, str], complete: bool
) -> dict[str, Any]:
    """Return the figures of a contrast from the runs so far. Interval and detectable effect wait for the last run."""
    ours, theirs = (by_variant[name] for name in pair)
    metric = comparison.options.metric
    differences = differences_of(ours, theirs, metric)
    found: dict[str, Any] = {"ours": pair[0], "theirs": pair[1], "seeds": list(differences)}
    shared = {"rows": "data", "order": "order", "training": "training"}
    found |= {f"same_{key}": _same(ours, theirs, what) for key, what in shared.items()}
    found |= {"differences": list(differences.values()), "p": None, "p_holm": None, "mean": None, "sd": None}
    found |= {"interval": None, "interval_over": None, "smallest_effect": None, "smallest_p": None}
    if not differences:
        return found
    values, n = list(differences.values()), len(differences)
    mean, sd = mean_sd(values)
    found |= {"mean": mean, "sd": sd, "smallest_p": smallest_p(n)}
    if sd is not None:
        found["p"] = sign_flip(values)
    if complete:
        counts = _counts(ours, theirs, metric, set(differences))
        if counts is not None:
            over = "seeds and examples" if n > 1 else "examples"
            found |= {"interval": interval_two_level(*counts), "interval_over": over}
        elif sd is not None:
            found |= {"interval": interval_seeds(values), "interval_over": "seeds"}
        if sd is not None:
            found["smallest_effect"] = smallest_effect(sd, n, contrasts=len(comparison.contrasts))
    return found


def _same(ours: Sequence[CellResult], theirs: Sequence[CellResult], what: str) -> bool | None:
    """Return True if both sides share `what` at every seed that both have run; None if this is not known."""
    a, b = ({r.cell.seed: r.same.get(what) for r in side} for side in (ours, theirs))
    sides = [(a[seed], b[seed]) for seed in a if seed in b]
    known = bool(sides) and all(None not in pair for pair in sides)
    return all(own == other for own, other in sides) if known else None


def verdict_of(contrast: Mapping[str, Any], complete: bool) -> str:
    """Return the result in words: only at the end, only with enough seeds, and only by p after Holm."""
    n = len(contrast["seeds"])
    if not n:
        return "not measured" if complete else "nothing to compare yet"
    if n < 2:
        return "one seed: no spread, no test"
    if n < MIN_SEEDS:
        return f"not tested: with {n} seeds no p is below {smallest_p(n):.2g}"
    if not complete:
        return "wait for the end"  # testing a part of the seeds would be one of many looks
    return "different" if contrast["p_holm"] <= ALPHA else "no difference shown"


def _counts(
    ours: Sequence[CellResult], theirs: Sequence[CellResult], metric: str, seeds: Container[int]
) -> tuple[Counts, Counts] | None:
    """Return the metric's sums per example of both sides; None without per-example files of the same held-out rows.

    seeds  the seeds that have the metric on both sides
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
    """Return example id -> (this column, n_tokens); None if the run has no such figures."""
    if not path.exists():
        return None
    ids, scores, brier_sum = read_eval(path)
    sums = {"nll_sum": scores.nll_sum, "n_correct": scores.n_correct, "brier_sum": brier_sum}[numerator]
    return None if sums is None else dict(zip(ids, zip(sums, scores.n_tokens, strict=True), strict=True))
