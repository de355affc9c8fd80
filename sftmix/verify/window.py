"""The steps of a run that are made again: which ones, from which checkpoint, and to which one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.checkpoints import CHECKPOINTS, step_path, steps_in
from sftmix.common.errors import ConfigError
from sftmix.common.files import MANIFEST, read_json
from sftmix.common.steps import read_steps
from sftmix.pipeline.directory import origin
from sftmix.pipeline.finished import is_run

TRAINED = ("train", "reference", "baseline")
"""Stages that have steps."""
STEPS = 10
"""Steps of a window, where neither the next checkpoint nor the end comes before."""


@dataclass(frozen=True)
class Window:
    """Steps of a stage: those after `start`, up to and with `end`.

    run       run directory
    place     directory with the stage's files: in another run if the stage was adopted from there
    last      the last step of the stage so far
    finished  True if the stage is done
    kept      steps of its checkpoints, from the first on
    logged    step -> its line in metrics.jsonl
    """

    run: Path
    stage: str
    place: Path
    start: int
    end: int
    last: int
    finished: bool
    kept: tuple[int, ...]
    logged: Mapping[int, Mapping[str, Any]]

    def checkpoint(self, step: int) -> Path:
        return step_path(self.place / CHECKPOINTS, step)


def window_of(run: Path, stage: str = "train", start: int | None = None, steps: int | None = None) -> Window:
    """Choose the steps of a stage.

    start  a step with a checkpoint, or 0, the model before training; None: the earliest checkpoint with steps after it
    steps  number of steps; None: up to the next checkpoint or to the end of the stage, but at most STEPS
    Raises ConfigError for what is not there, with what is.
    """
    if not is_run(run):
        raise ConfigError(f"{run} is not a run directory (it has no config.yaml)")
    place = origin(run / stage)
    logged = logged_steps(place)
    if not (run / stage / "inputs.json").exists() or not logged:
        there = [name for name in TRAINED if (origin(run / name) / "metrics.jsonl").exists()]
        found = f"there is {', '.join(there)}" if there else "nothing was trained there yet"
        raise ConfigError(f"--stage {stage}: {run} has no steps of this stage; {found}")
    finished = (run / stage / MANIFEST).exists()
    last = int(read_json(place / "figures.json")["steps"]) if finished else max(logged)
    kept = tuple(sorted(steps_in(place / CHECKPOINTS)))
    start = _start(place, start, kept, last)
    return Window(
        run, stage, place, start, _end(start, steps, kept, last, finished=finished), last, finished, kept, logged
    )


def logged_steps(stage: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a stage's metrics.jsonl by their steps."""
    return {int(line["step"]): line for line in read_steps(stage)}


def _start(place: Path, given: int | None, kept: tuple[int, ...], last: int) -> int:
    before_end = [0, *(step for step in kept if 0 < step < last)]
    if given is None:
        return before_end[min(1, len(before_end) - 1)]
    if given in before_end:
        return given
    if given >= last:
        raise ConfigError(f"--from is {given}, but {place} has {last} steps: there is none after it")
    raise ConfigError(
        f"--from is {given}, but {place / CHECKPOINTS} has no checkpoint of this step; allowed: "
        f"{', '.join(map(str, before_end))} (0 is the model before training). A run keeps more of them with "
        "--checkpoint.keep N"
    )


def _end(start: int, steps: int | None, kept: tuple[int, ...], last: int, *, finished: bool) -> int:
    if steps is None:
        ends = [step for step in (*kept, *([last] if finished else [])) if start < step <= last]
        return min([start + STEPS, last, *ends])
    if not 0 < steps <= last - start:
        raise ConfigError(f"--steps is {steps}; allowed: 1 to {last - start}, the number of steps after step {start}")
    return start + steps
