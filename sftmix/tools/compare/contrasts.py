"""A contrast of a table: a difference of two arms within each seed, or a difference of two such differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.config.read import read_yaml
from sftmix.disk.files import read_json
from sftmix.disk.regular import regular
from sftmix.options.training import LAYOUT
from sftmix.pipeline.validity import differences
from sftmix.tools.compare.plan import Comparison
from sftmix.tools.compare.statistics import interval, mean_sd, per_example, sign_flip
from sftmix.types import Float64
from sftmix.words.differing import NOTHING, differing

SIGNS = (1, -1, -1, 1)
"""The signs of the arms of a contrast: A - B, or (A - B) - (C - D), which holds two controls beside each other."""
UNRECORDED = ("callbacks", "checkpoint.every", "checkpoint.keep", *(f"training.{name}" for name in LAYOUT))
"""Options that decide no training, and may decide a figure: the best of twice as many evaluations is lower."""
RATIOS = {"eval_nll_after": "nll_sum", "eval_accuracy": "n_correct", "calibration.brier": "brier_sum"}
"""Metrics that are a sum over examples / the number of response tokens, with the numerator's column of eval.parquet."""


def contrast_of(comparison: Comparison, variants: Mapping[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """Return the figures of a contrast for table.json; None for what too few seeds do not give.

    variants  name -> its `runs`, in the order of the seeds
    arms      two or four of them; seeds at which one has no value are left out
    """
    metric, signs = comparison.options.metric, SIGNS[: len(arms)]  # [A, B]: (1, -1)
    by_seed = {}
    files = []
    for runs in zip(*(variants[name]["runs"] for name in arms), strict=True):
        figures = [run["metrics"].get(metric) for run in runs]  # [A, B, C, D] at this seed
        if None not in figures:
            by_seed[runs[0]["seed"]] = float(np.dot(signs, figures))
            files += [Path(comparison.out) / run["run"] / "train/eval.parquet" for run in runs]
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
        "inputs_that_differ": sorted(_differing(comparison, variants, arms)),
        "differences": values,
        "mean": mean,
        "sd": sd,
        "p": None if sd is None else sign_flip(values),
        "interval": interval(values if by_example is None else by_example) if values else None,
        "interval_over": " and ".join(over) or None,
    }


def _differing(comparison: Comparison, variants: Mapping[str, Any], arms: Sequence[str]) -> set[str]:
    """Return the names of the inputs in which the trainings of two arms differ, or of each of two pairs of them.

    Inputs are compared as the stages recorded them: `auto`, and the pairing that it is, are one value.
    """
    names = set[str]()
    for pair in zip(arms[::2], arms[1::2], strict=True):
        for runs in zip(*(variants[name]["runs"] for name in pair), strict=True):
            inputs = [read_json(Path(comparison.out) / run["run"] / "train" / "inputs.json") for run in runs]
            # ["objective.mu: 0.2 -> 0.4"], of which the name before ": " is shown.
            names |= {line.partition(": ")[0] for line in differences(*inputs)}
            # As they were trained: a table may go on under other options, which change no run that is done.
            made = [read_yaml(Path(comparison.out) / run["trained_in"] / "config.yaml") for run in runs]
            names |= unrecorded(*made)
    return names


def unrecorded(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """Return the options that no stage records, and that differ in two configurations which both have them."""
    return {name for name, *values in differing(old, new) if name.startswith(UNRECORDED) and NOTHING not in values}


def _by_example(metric: str, files: Sequence[Path], signs: Sequence[int]) -> Float64 | None:
    """Return f64[S, N], the parts of the held-out examples in a contrast at each seed; None unless all files have them.

    files  eval.parquet of each arm, seed by seed
    """
    import pandas as pd

    if not files or metric not in RATIOS or not all(file.exists() for file in files):
        return None
    columns = [RATIOS[metric], "n_tokens"]
    frames = (pd.read_parquet(regular(file)).set_index("id").reindex(columns=columns) for file in files)
    table = pd.concat(frames, axis=1).sort_index()  # joined by id: files need not agree in their order
    if table.isna().any(axis=None):  # other held-out rows, or files without these columns
        return None
    # [2 F, N] of F files: sums and tokens by turns. Row by row in memory, as numpy then adds pairwise: it rounds less.
    sums = np.ascontiguousarray(table.to_numpy(np.float64).T)
    parts = per_example(sums[::2], sums[1::2])
    return np.tensordot(signs, parts.reshape(-1, len(signs), parts.shape[1]), axes=(0, 1))  # [S, arms, N] -> [S, N]
