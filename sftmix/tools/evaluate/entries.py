"""Results on disk: one file for each task, model and settings, so that none is ever overwritten by another."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json, sha256_json, write_json
from sftmix.pipeline.finished import OF_A_RUN, FinishedModel

FOLDER = "evaluation"
"""Where the results are, in a run directory."""


@dataclass(frozen=True)
class Score:
    """A metric of a task on one model.

    value, stderr  in the unit of the metric; stderr is None where lm-eval gives none
    n              questions
    questions      hash of each question, in their order; empty for a group of tasks
    values         the metric of each question, in the same order
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    questions: list[str]
    values: list[float]


@dataclass(frozen=True)
class Entry:
    """The result of one task on one model.

    settings  all that the numbers depend on, but the model: few-shot examples, limit, seed, template, hashes, versions
    identity  fingerprint of the model's files
    scores    by the name of the task; several where the task is a group
    all       every metric that lm-eval gave, by the name of the task
    cut       prompts that were longer than the model's context and lost their beginning
    finished  Unix time, seconds
    run       whose target, baseline or base it is: the run directory, as seen from the directory of the results, so
              that both can be moved together; None for a model of its own
    """

    task: str
    model: str
    path: str
    identity: str
    settings: dict[str, Any]
    scores: dict[str, Score]
    all: dict[str, dict[str, Any]]
    cut: int
    seconds: float
    finished: float
    run: str | None = None


def entry_file(place: Path, task: str, model: str, identity: str, settings: Mapping[str, Any]) -> Path:
    """Return the file of a result; its name tells the task and the model, and has a hash of the rest."""
    names = [re.sub(r"[^\w.-]+", "-", name).strip("-.") for name in (task, model)]
    return place / "{}.{}.{}.json".format(*names, sha256_json([model, identity, settings])[:12])


def run_of(place: Path, model: FinishedModel) -> str | None:
    """Return the field `run` of an entry; None for a model that is named by its own place."""
    if model.run is None or model.name not in OF_A_RUN:
        return None
    return os.path.relpath(model.run.resolve(), place.resolve())


def check_run(place: Path, models: Sequence[FinishedModel]) -> None:
    """Raise ConfigError if a directory has results of another run: target would be of two trainings."""
    runs = {run for model in models if (run := run_of(place, model)) is not None}
    for entry in read_entries(place):
        if runs and entry.run is not None and entry.run not in runs:
            raise ConfigError(
                f"{place} has results of the run {_shown(place, entry.run)}, and these would be of "
                f"{', '.join(_shown(place, run) for run in sorted(runs))}; name another directory with --to DIR"
            )


def _shown(place: Path, run: str) -> str:
    return os.path.normpath(place.resolve() / run)


def write_entry(place: Path, entry: Entry) -> Path:
    """Write a result and return its file."""
    file = entry_file(place, entry.task, entry.model, entry.identity, entry.settings)
    write_json(file, asdict(entry))
    return file


def read_entries(place: Path) -> list[Entry]:
    """Read all results of a directory, oldest first."""
    raw = [read_json(file) for file in sorted(place.glob("*.*.????????????.json"))]
    found = [Entry(**{**one, "scores": {k: Score(**score) for k, score in one["scores"].items()}}) for one in raw]
    return sorted(found, key=lambda entry: entry.finished)
