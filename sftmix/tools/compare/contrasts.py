"""A contrast of a table: a difference of two arms within each seed, or a difference of two such differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.disk.files import read_json
from sftmix.pipeline.validity import differences
from sftmix.tools.compare.plan import Comparison
from sftmix.tools.compare.statistics import interval, mean_sd, per_example, sign_flip
from sftmix.types import Float64

SIGNS = (1, -1, -1, 1)
"""The signs of the arms of a contrast: A - B, or (A - B) - (C - D), which holds two controls beside each other."""
RATIOS = {"eval_nll_after": "nll_sum", "eval_accuracy": "n_correct", "calibration.brier": "brier_sum"}
"""Metrics that are a sum over examples / the number of response tokens, with the numerator's column of eval.parquet."""


def contrast_of(comparison: Comparison, variants: Mapping[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """Return the figures of a contrast for table.json; None for what too few seeds do not give.

    variants  name -> its `runs`, in the order of the seeds
    arms      two or four of them; seeds at which one has no value are left out
    """
    metric, signs = comparison.options.metric, SIGNS[: len(arms)]  # [A, B]: (1, -1)
    by_seed = {}
    # Options that decide no training may decide a figure: the best of twice as many evaluations is lower.
    changed = {name for pair in zip(arms[::2], arms[1::2], strict=True) for name in comparison.changed(*pair)}
    files = []
    for runs in zip(*(variants[name]["runs"] for name in arms), strict=True):
        trained = [Path(comparison.out) / run["run"] / "train" for run in runs]
        changed |= _differing(trained)
        figures = [run["metrics"].get(metric) for run in runs]  # [A, B, C, D] at this seed
        if None not in figures:
            by_seed[runs[0]["seed"]] = float(np.dot(signs, figures))
            files += [stage / "eval.parquet" for stage in trained]
    values = list(by_seed.values())
    mean, sd = mean_sd(values) if values else (None, None)
    by_example = _by_example(metric, files, signs)
    # "seeds and examples", "seeds", "examples"; None for one seed without parts of examples.
    over = ["seeds"] * (len(values) > 1) + ["examples"] * (by_example is not None)
    names = arms if len(arms) == 2 else [f"({one} − {other})" for one, other in (arms[:2], arms[2:])]
    return {
        "ours": names[0],
        "theirs": names[1],
        "seeds": list(by_seed),
        "inputs_that_differ": sorted(changed),
        "differences": values,
        "mean": mean,
        "sd": sd,
        "p": None if sd is None else sign_flip(values),
        "interval": interval(values if by_example is None else by_example) if values else None,
        "interval_over": " and ".join(over) or None,
    }


def _differing(stages: Sequence[Path]) -> set[str]:
    """Return the names of the inputs in which two trainings differ, or each of two pairs of them."""
    inputs = [read_json(stage / "inputs.json") for stage in stages]
    # ["objective.mu: 0.2 -> 0.4"], of which the name before ": " is shown.
    lines = [differences(*pair) for pair in zip(inputs[::2], inputs[1::2], strict=True)]
    return {line.partition(": ")[0] for of_pair in lines for line in of_pair}


def _by_example(metric: str, files: Sequence[Path], signs: Sequence[int]) -> Float64 | None:
    """Return f64[S, N], the parts of the held-out examples in a contrast at each seed; None unless all files have them.

    files  eval.parquet of each arm, seed by seed
    """
    import pandas as pd

    if not files or metric not in RATIOS or not all(file.exists() for file in files):
        return None
    columns = [RATIOS[metric], "n_tokens"]
    frames = (pd.read_parquet(file).set_index("id").reindex(columns=columns) for file in files)
    table = pd.concat(frames, axis=1).sort_index()  # joined by id: files need not agree in their order
    if table.isna().any(axis=None):  # other held-out rows, or files without these columns
        return None
    # [2 F, N] of F files: sums and tokens by turns. Row by row in memory, as numpy then adds pairwise: it rounds less.
    sums = np.ascontiguousarray(table.to_numpy(np.float64).T)
    parts = per_example(sums[::2], sums[1::2])
    return np.tensordot(signs, parts.reshape(-1, len(signs), parts.shape[1]), axes=(0, 1))  # [S, arms, N] -> [S, N]
