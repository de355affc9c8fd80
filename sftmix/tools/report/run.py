"""The files of a finished run, read back for the report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json
from sftmix.common.tables import read_dynamics, read_split
from sftmix.components.confidence import is_measured
from sftmix.config import RunConfig
from sftmix.pipeline.directory import check_finished
from sftmix.pipeline.finished import refuse_no_run
from sftmix.pipeline.rows import RunRows, rows_of_run
from sftmix.types import Example, Rows, Scores, Split, TrainingDynamics


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


def read_summary(path: Path, *stages: str) -> dict[str, Any]:
    """Return summary.json of a run that has one of the stages, train by default.

    Raises ConfigError where it has none of them, DifferenceError for a changed stage.
    """
    refuse_no_run(path)
    check_finished(path)
    summary = read_json(path / "summary.json", stages=dict) if (path / "summary.json").exists() else {"stages": {}}
    if summary["stages"].keys().isdisjoint(stages or ("train",)):
        raise ConfigError(f"{path} is not finished; `sftmix status {path}` says how far it is")
    return summary


def read_run(path: Path) -> RunView:
    """Read a run that is as far as its confidence, with its rows, which are read from their files (or the cache).

    Raises ConfigError where `path` is no such run, or its rows are no longer those that it was made from.
    """
    summary = read_summary(path, "confidence", "train")
    config, rows = rows_of_run(path, progress=True)
    split, dynamics = path / "split" / "split.parquet", path / "confidence" / "dynamics.parquet"
    confidence = path / "confidence" / "confidence.parquet"
    return RunView(
        path,
        config,
        summary,
        rows,
        rows.table(confidence if confidence.exists() else None),
        read_split(split)[1] if split.exists() else None,
        read_dynamics(dynamics).of(rows.data.train.ids) if dynamics.exists() else None,
    )


def text_of(example: Example) -> tuple[str, str]:
    """Return instruction and response: all turns before the last (with their roles if there are several), the last."""
    *before, last = example.messages
    if len(before) == 1 and before[0].role == "user":
        return before[0].content, last.content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in before), last.content
