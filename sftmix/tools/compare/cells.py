"""The figures of finished cells of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError, nearest
from sftmix.common.figures import flatten
from sftmix.common.files import MANIFEST, read_json, sha256_json
from sftmix.tools.compare.plan import Cell, Comparison

DIVERGED = "diverged.json"
"""In the directory of a cell whose target diverged: the error. Without it, the same command tries the cell again."""

SETTINGS = ("seed", "world_size", "data.max_length")
"""Numbers of a summary.json that are chosen, not measured: their means over seeds say nothing."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """The results of a cell that is over.

    metrics   every finite number of its summary.json but SETTINGS, nested ones with dots; none if it diverged
    no_value  names of its figures that are null or not finite
    adopted   stage -> directory of the stage it was taken from, relative to the cell's stage
    revision  version and git revision that trained the target; empty if it diverged
    same      things that runs may share, by the inputs of their stages: data, eval, reference, order, which decides the
              examples of each step, and training, all inputs of the target's
    """

    cell: Cell
    metrics: Mapping[str, float]
    no_value: Sequence[str]
    adopted: Mapping[str, str]
    revision: str
    same: Mapping[str, object]


def result_of(cell: Cell, summary: Mapping[str, Any]) -> CellResult:
    """Return the result of a cell whose run returned `summary`, which is empty if it diverged."""
    from sftmix.pipeline.directory import ADOPTED

    adopted = {path.parent.name: read_json(path)["from"] for path in sorted(cell.path.glob(f"*/{ADOPTED}"))}
    figures = {name: value for name, value in flatten(summary) if name not in SETTINGS}
    metrics = {name: value for name, value in figures.items() if np.isfinite(value)}
    inputs = {s: read_json(p) for s in ("reference", "train") if (p := cell.path / s / "inputs.json").exists()}
    trained = inputs.get("train", {})
    same = {**{key: trained.get(key) for key in ("data", "eval")}, "reference": inputs.get("reference")}
    same |= {"order": _order(trained) if trained else None, "training": trained or None}
    revision = " ".join(filter(None, (summary.get("version"), summary.get("git_revision"))))
    return CellResult(cell, metrics, [n for n in figures if n not in metrics], adopted, revision, same)


def is_over(run: Path) -> bool:
    """Return True if the target of a run is trained, or has diverged: nothing is left to do."""
    return (run / "train" / MANIFEST).exists() or has_diverged(run)


def has_diverged(run: Path) -> bool:
    """Return True if a table has noted that the training of a run's target diverged, and no one trained it since."""
    return (run / DIVERGED).exists() and not (run / "train" / MANIFEST).exists()


def _order(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that decide the examples of each step of a training with these inputs, and nothing else."""
    options = inputs["training"]
    length = {"epochs": options["epochs"]} if options["max_steps"] is None else {"max_steps": options["max_steps"]}
    found = {key: inputs.get(key) for key in ("data", "split", "confidence", "pairing", "seed")}
    # Pairs made from a run's own losses depend on every input that decides these losses.
    own_losses = sha256_json(inputs) if "online" in inputs else None
    return {**found, **length, "global_batch_size": options["global_batch_size"], "own_losses": own_losses}


_ONLY_WITH_PAIRS = ("confidence", "spearman_confidence_length", "confounds", "stages")
"""Groups of figures that runs without a split lack in part: the first of several variants does not decide on these."""


def refuse_unknown_metrics(comparison: Comparison, results: Sequence[CellResult]) -> None:
    """Raise ConfigError if `metric` or `metrics` names no figure of the runs, as soon as this can be known.

    It is known after the first run with figures; for those of the split, after one of every variant.
    """
    options, measured = comparison.options, [r for r in results if r.metrics or r.no_value]
    there = list(dict.fromkeys(name for r in measured for name in (*r.metrics, *r.no_value)))
    if not there:  # all have diverged so far
        return
    some_unmeasured = len({r.cell.variant for r in measured}) < len(comparison.variants)
    for key, name in [("metric", options.metric), *(("metrics", name) for name in options.metrics or ())]:
        known = name in there or (key == "metrics" and any(m.startswith(f"{name}.") for m in there))
        early = some_unmeasured and name.partition(".")[0] in _ONLY_WITH_PAIRS
        if not known and not early:
            siblings = [m for m in there if m.rpartition(".")[0] == name.rpartition(".")[0]]
            guess = nearest(name, siblings) or nearest(name, there)
            raise ConfigError(
                f"{key} names {name!r}, which is no figure of a run's summary.json ({measured[-1].cell.path})."
                f"{guess} Figures there: {', '.join(siblings or there)}"
            )
