"""The steps of a run that are made again: which ones, from which checkpoint, and to which one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sftmix.disk.files import CHECKPOINTS, MANIFEST, naming_damage, read_json, read_steps, step_path, steps_in
from sftmix.pipeline.inputs import config_of_reference
from sftmix.pipeline.stages import TRAINED
from sftmix.pipeline.validity import origin
from sftmix.tools.runs.read import as_started, read_whole, refuse_no_run
from sftmix.words.errors import ConfigError

if TYPE_CHECKING:
    Trained = str
else:
    Trained = Literal[TRAINED]
"""The name of a stage with steps."""
Machine = dict[str, Any]
"""As in `sftmix.training.machine`, which imports torch."""
NEAR = 50
"""Most steps that are made again to reach weights of the run, if no number of steps is given."""
STEPS = 10
"""Steps of a window if no weights are that near."""


@dataclass
class Window:
    """Steps of a stage of a run: those after `start`, up to and with `end`.

    last         the last step of the stage so far
    finished     True if the stage is done
    checkpoints  their steps, from the first on
    """

    run: Path
    stage: str
    start: int
    end: int
    last: int
    finished: bool
    checkpoints: tuple[int, ...]

    def checkpoint(self, step: int) -> Path:
        return step_path(self.run / self.stage / CHECKPOINTS, step)

    @property
    def machines(self) -> list[Machine]:
        """The machines that made the steps, as the run recorded them; none if one is unknown."""
        newest = self.checkpoint(max(self.checkpoints, default=0)) / "state.json"
        file = self.run / self.stage / "figures.json" if self.finished else newest
        # Steps after the last checkpoint of an unfinished run are taken as made by the machine that wrote it.
        with naming_damage(file):
            recorded = read_json(file).get("machines", []) if file.exists() else []
            return machines_between(recorded, self.start, self.last)


def window_of(run: Path, stage: str = "train", start: int | None = None, steps: int | None = None) -> Window:
    """Choose the steps of a stage.

    start  a step with a checkpoint, or 0, the model before training; None: the last of these with weights after it
    steps  number of steps; None: up to the next weights, which a checkpoint holds or the exported model; STEPS, or up
           to the end, if there are none at most NEAR steps away
    Raises ConfigError for what is not there, with what is, and DifferenceError for a file that cannot be read.
    """
    refuse_no_run(run)
    directory = run / stage
    if (source := origin(directory)) != directory:
        raise ConfigError(f"--stage {stage}: {run} adopted this stage; verify the run that made it, {source.parent}")
    logged, finished = read_steps(directory), (directory / MANIFEST).exists()
    last = logged[-1]["step"] if logged else 0
    if not last or (stage == "reference" and not finished):
        raise ConfigError(
            f"--stage {stage}: {run} has no steps of this stage, or is not done with it (see `sftmix status`)"
        )
    checkpoints = sorted({*steps_in(directory / CHECKPOINTS)} - {0})  # 0: stopped before the first step
    if finished:
        last = read_json(directory / "figures.json", steps=int)["steps"]
    starts = [0, *(step for step in checkpoints if step < last)]  # 0 is the base model, which needs no checkpoint
    # The exported model has the weights of the last step.
    kept = [*checkpoints, last] if finished and (directory / "model").is_dir() else checkpoints
    if start is None:
        # With checkpoints 60 and 100 it is 60, so that the window ends with weights to compare.
        start = max(step for step in starts if step < max(kept, default=last))
    elif start not in starts:
        raise ConfigError(
            f"--from is {start}, but {directory / CHECKPOINTS} has no checkpoint of this step, with steps after it; "
            f"allowed: {', '.join(map(str, starts))} (0 is the model before training). A run keeps more of them with "
            "--checkpoint.keep N"
        )
    if steps is None:
        # From 0, with the next weights at 60: too far, so 10 steps; from 45: up to 60.
        near = [step for step in kept if start < step <= min(start + NEAR, last)]
        steps = min(near, default=min(start + STEPS, last)) - start
    elif not 0 < steps <= last - start:
        raise ConfigError(f"--steps is {steps}; allowed: 1 to {last - start}, the number of steps after step {start}")
    return Window(run, stage, start, start + steps, last, finished, tuple(checkpoints))


def refuse_too_few_ranks(window: Window) -> None:
    """Raise ConfigError if ranks shared the weights in this stage, and torchrun did not start this process."""
    with as_started(window.run):
        config = read_whole(window.run)
    from sftmix.tools.runs.start import refuse_one_rank  # with what reads rows, which no help waits for

    own = config_of_reference(config) if window.stage == "reference" else config
    refuse_one_rank(own.training.parallel, *[machine["ranks"] for machine in window.machines[-1:]])


def machines_between(recorded: Sequence[Machine], start: int, end: int) -> list[Machine]:
    """Return the machines, without `after`, of the steps after `start` up to `end`; none if one is unknown."""
    ends = [*(one["after"] for one in recorded[1:]), math.inf]  # [{after: 0}, {after: 4}] -> 4, inf
    inside = [one for one, upto in zip(recorded, ends, strict=False) if one["after"] < end and upto > start]
    if not inside or inside[0]["after"] > start:  # the steps before a machine of an older record are of an unknown one
        return []
    return [{name: one[name] for name in one if name != "after"} for one in inside]


def same_bits(recorded: Sequence[Machine], machine: Machine) -> bool:
    """Return True if steps of the recorded machines give the same bits on this one.

    On a GPU they may not even on the same machine: some of its kernels add in another order each time.
    """
    return bool(recorded) and all(one == machine for one in recorded) and machine["cuda"] is None
