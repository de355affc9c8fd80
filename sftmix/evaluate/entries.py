"""Results on disk: one file for each task, model and settings, so that none is ever overwritten by another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftmix.common.files import read_json, sha256_json, write_json

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


def entry_file(place: Path, task: str, model: str, identity: str, settings: Mapping[str, Any]) -> Path:
    """Return the file of a result; its name tells the task and the model, and has a hash of the rest."""
    names = [re.sub(r"[^\w.-]+", "-", name).strip("-.") for name in (task, model)]
    return place / "{}.{}.{}.json".format(*names, sha256_json([model, identity, settings])[:12])


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
