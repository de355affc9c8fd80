"""The figures of finished cells of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.figures import flatten
from sftmix.common.files import MANIFEST, read_json
from sftmix.tools.compare.plan import Cell

DIVERGED = "diverged.json"
"""In the directory of a cell whose target diverged: the error. Without it, the same command tries the cell again."""

SETTINGS = ("seed", "world_size", "data.max_length")
"""Numbers of a summary.json that are chosen, not measured: their means over seeds say nothing."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """The results of a cell that is over.

    metrics   every finite number of its summary.json but SETTINGS, nested ones with dots; none if it diverged
    revision  version and git revision that trained the target; empty if it diverged
    inputs    what the target was trained with, as train/inputs.json has it; empty where that is not known
    """

    cell: Cell
    metrics: Mapping[str, float]
    revision: str
    inputs: Mapping[str, Any]


def result_of(cell: Cell, summary: Mapping[str, Any]) -> CellResult:
    """Return the result of a cell whose run returned `summary`, which is empty if it diverged."""
    metrics = {name: x for name, x in flatten(summary) if name not in SETTINGS and math.isfinite(x)}
    revision = " ".join(filter(None, (summary.get("version"), summary.get("git_revision"))))
    inputs = cell.path / "train" / "inputs.json"
    return CellResult(cell, metrics, revision, read_json(inputs) if inputs.exists() else {})


def is_over(run: Path) -> bool:
    """Return True if the target of a run is trained, or has diverged: nothing is left to do."""
    return (run / "train" / MANIFEST).exists() or has_diverged(run)


def has_diverged(run: Path) -> bool:
    """Return True if a table has noted that the training of a run's target diverged, and no one trained it since."""
    return (run / DIVERGED).exists() and not (run / "train" / MANIFEST).exists()
