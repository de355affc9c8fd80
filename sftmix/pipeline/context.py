"""What a stage of a run is, and RunContext, which makes one or reads it back: configuration, ranks, directory, rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sftmix.common.world import World
from sftmix.config import RunConfig
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.identity import STAGE_INPUTS, Known
from sftmix.pipeline.rows import RunRows
from sftmix.training.log import PeakMemory, StopAtOnce
from sftmix.training.loop import Stage as TrainingStage
from sftmix.training.loop import StageResult, train


class Made(NamedTuple):
    """What a stage has made: its files, relative to its directory, its figures, and a line for people."""

    files: Sequence[str]
    figures: Mapping[str, Any] = {}
    line: str = ""


class Stage(NamedTuple):
    """A stage of a run. All ranks call each of its functions; `STAGE_INPUTS` has its inputs by its name.

    make  makes its files
    read  returns what the files hold; a finished stage is read back if all its inputs are equal
    """

    name: str
    make: Callable[[], Made]
    read: Callable[[], Any] = lambda: None


@dataclass
class RunContext:
    """One run in progress; `enter` is the runner of its stages.

    config     the configuration, with the format of the rows settled
    world      the ranks of the run, which call each method together
    directory  the run directory, which is held
    stop       the signals that end the run between two stages
    rows       training and held-out rows, as the target sees them
    """

    config: RunConfig
    world: World
    directory: RunDirectory
    stop: StopAtOnce
    rows: RunRows

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    def say(self, text: str) -> None:
        """Print a line on rank 0, at once."""
        if self.world.is_main:
            print(text, flush=True)

    def enter(self, stage: Stage) -> Any:
        """Make a stage unless it is done, and return what its files hold.

        Raises the errors of `RunDirectory.begin` before anything is written, Stopped if a signal came before.
        """
        self.stop.check(self.world)
        inputs = STAGE_INPUTS[stage.name](Known(self.config, self.world, self.rows, self.path))
        memory, began = PeakMemory(self.world.device), time.time()
        if self.directory.begin(stage.name, inputs, self.config.yaml()):
            return stage.read()
        made = stage.make()
        value = stage.read()  # before the stage is done: what cannot be read must not count as done
        seconds = time.time() - began
        figures = {"wall_seconds": seconds, **made.figures, "peak_memory_bytes": self.world.max(memory.bytes())}
        self.directory.finish(stage.name, made.files, figures)
        if made.line:
            self.say(f"{made.line} ({seconds:.0f} s)")
        return value

    def train(self, stage: TrainingStage) -> StageResult:
        """Train to the end, from the newest valid checkpoint on."""
        return train(stage, self.world)
