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
from sftmix.pipeline.finished import refuse_no_run

TRAINED = ("train", "reference", "baseline")
"""Stages that have steps."""
NEAR = 50
"""Most steps that are made again to reach weights of the run, where no number of steps is given."""
STEPS = 10
"""Steps of a window, where no weights are so near."""


@dataclass(frozen=True)
class Window:
    """Steps of a stage: those after `start`, up to and with `end`.

    run          run directory
    place        directory where the stage was made: in another run if it was adopted from there, and maybe gone
    last         the last step of the stage so far
    finished     True if the stage is done
    checkpoints  their steps, from the first on
    logged       step -> its line in metrics.jsonl
    """

    run: Path
    stage: str
    place: Path
    start: int
    end: int
    last: int
    finished: bool
    checkpoints: tuple[int, ...]
    logged: Mapping[int, Mapping[str, Any]]

    def checkpoint(self, step: int) -> Path:
        return step_path(self.place / CHECKPOINTS, step)

    def file(self, name: str) -> Path:
        """Return a file of the stage in the run, or where the stage was made: an adopted one has only its outputs."""
        path = self.run / self.stage / name
        return path if path.exists() else self.place / name


def window_of(run: Path, stage: str = "train", start: int | None = None, steps: int | None = None) -> Window:
    """Choose the steps of a stage.

    start  a step with a checkpoint, or 0, the model before training; None: the earliest checkpoint that is at most NEAR
           steps before the next weights, or else the model before training, or else the earliest checkpoint
    steps  number of steps; None: up to the next weights, which a checkpoint holds or the exported model; STEPS, or up
           to the end, if there are none at most NEAR steps away
    Raises ConfigError for what is not there, with what is, and DifferenceError for a file that cannot be read.
    """
    refuse_no_run(run)
    directory, place = run / stage, origin(run / stage)
    logged = logged_steps(directory if (directory / "metrics.jsonl").exists() else place)
    finished = (directory / MANIFEST).exists()
    last = read_json(directory / "figures.json").get("steps", 0) if finished else max(logged, default=0)
    if not (directory / "inputs.json").exists() or not last or not logged or (stage == "reference" and not finished):
        trained = [name for name in TRAINED if (origin(run / name) / "metrics.jsonl").exists()]
        raise ConfigError(
            f"--stage {stage}: {run} has no steps of this stage, or is not done with it, or the run that it was "
            f"adopted from is gone; there is {', '.join(trained) or 'nothing yet'}"
        )
    checkpoints = tuple(sorted(steps_in(place / CHECKPOINTS)))
    weights = {*checkpoints, last} if finished and (directory / "model").is_dir() else {*checkpoints}
    start = _start(place, start, checkpoints, last, weights)
    return Window(run, stage, place, start, _end(start, steps, last, weights), last, finished, checkpoints, logged)


def logged_steps(stage: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a stage's metrics.jsonl by their steps."""
    return {line["step"]: line for line in read_steps(stage)}


def _start(place: Path, requested: int | None, checkpoints: tuple[int, ...], last: int, weights: set[int]) -> int:
    inside = [step for step in checkpoints if 0 < step < last]
    if requested is None:
        near = [step for step in (*inside, 0) if any(0 < end - step <= NEAR for end in weights)]
        return [*near, *inside, 0][0]
    if requested in (0, *inside):
        return requested
    raise ConfigError(
        f"--from is {requested}, but {place / CHECKPOINTS} has no checkpoint of this step, with steps after it; "
        f"allowed: {', '.join(map(str, (0, *inside)))} (0 is the model before training). A run keeps more of them with "
        "--checkpoint.keep N"
    )


def _end(start: int, steps: int | None, last: int, weights: set[int]) -> int:
    if steps is None:
        near = [step for step in weights if start < step <= min(start + NEAR, last)]
        return min(near, default=min(start + STEPS, last))
    if not 0 < steps <= last - start:
        raise ConfigError(f"--steps is {steps}; allowed: 1 to {last - start}, the number of steps after step {start}")
    return start + steps
