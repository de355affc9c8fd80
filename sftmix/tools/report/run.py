"""The files of a finished run, read back for the report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json
from sftmix.common.steps import read_steps
from sftmix.common.tables import read_dynamics, read_split
from sftmix.components.confidence import is_measured
from sftmix.config import RunConfig
from sftmix.pipeline.directory import check_finished
from sftmix.pipeline.finished import refuse_no_run
from sftmix.pipeline.rows import RunRows, rows_of_run
from sftmix.types import Example, Rows, Scores, Split, TrainingDynamics

ARMS = {"train": "target", "baseline": "NTP baseline"}
"""Stages that train a model from the base model on the same rows, with their names on the page."""


@dataclass(frozen=True)
class RunView:
    """A run with its rows; what it did not make is None.

    rows      as the target saw them
    scores    the table of the N training examples; confidence and variability are NaN without a reference
    split     the group of each
    dynamics  the reference's, of exactly these examples, in their order
    """

    path: Path
    config: RunConfig
    summary: dict[str, Any]
    rows: RunRows
    scores: Scores
    split: Split | None
    dynamics: TrainingDynamics | None

    def has(self, *names: str) -> bool:
        """Return True if the run has this file or directory."""
        return self.path.joinpath(*names).exists()

    @cached_property
    def metrics(self) -> dict[str, list[dict[str, Any]]]:
        """Lines of metrics.jsonl of each stage; none of one that did not train."""
        return {stage: read_steps(self.path / stage) for stage in ("reference", *ARMS)}

    @cached_property
    def by_confidence(self) -> Rows:
        """Rows with a confidence, least confident first; ties by place."""
        measured = np.flatnonzero(is_measured(self.scores.confidence))
        return measured[np.argsort(self.scores.confidence[measured], kind="stable")]

    @cached_property
    def examples(self) -> list[Example]:
        """Every training example as it was read."""
        return list(self.rows.data.train.examples())

    @cached_property
    def texts(self) -> list[tuple[str, str]]:
        """Instruction and response of every training example."""
        return [text_of(example) for example in self.examples]

    @cached_property
    def groups(self) -> list[str]:
        """Name of the group of every training example; none for a run without a split."""
        return [] if self.split is None else self.split.labels

    @property
    def objective(self) -> str:
        """Name of the target's objective."""
        return type(self.config.objective).__name__


def read_summary(path: Path) -> dict[str, Any]:
    """Return summary.json of a run; raise ConfigError where there is none, DifferenceError for a changed stage."""
    refuse_no_run(path)
    if not (path / "summary.json").exists():
        raise ConfigError(
            f"{path} has no summary.json: the run is not finished; `sftmix status {path}` says how far it is"
        )
    check_finished(path)
    summary = read_json(path / "summary.json", stages=dict)
    if "train" not in summary["stages"]:
        raise ConfigError(f"{path} has not trained its target yet: sftmix run --config {path / 'config.yaml'}")
    return summary


def read_run(path: Path) -> RunView:
    """Read a finished run with its rows, which are read from their files again (or from the cache).

    Raises ConfigError where `path` is no finished run, or its rows are no longer those that it was made from.
    """
    summary = read_summary(path)
    config, rows = rows_of_run(path, progress=True)
    ids = rows.data.train.ids
    confidence, split_file = path / "confidence" / "confidence.parquet", path / "split" / "split.parquet"
    split = None
    if split_file.exists():
        split = read_split(split_file)[1]
    dynamics_file = path / "confidence" / "dynamics.parquet"
    dynamics = read_dynamics(dynamics_file).of(ids) if dynamics_file.exists() else None
    scores = rows.table(confidence if confidence.exists() else None)
    return RunView(path, config, summary, rows, scores, split, dynamics)


def text_of(example: Example) -> tuple[str, str]:
    """Return instruction and response: all turns before the last (with their roles if there are several), the last."""
    *before, last = example.messages
    if len(before) == 1 and before[0].role == "user":
        return before[0].content, last.content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in before), last.content
