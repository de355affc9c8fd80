"""RunContext, which makes a stage of a run or reads it back: configuration, ranks, directory, rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sftmix.common.files import write_text
from sftmix.common.world import World
from sftmix.config import RunConfig
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.identity import STAGE_INPUTS, Known
from sftmix.pipeline.rows import RunRows
from sftmix.training.log import PeakMemory, StopAtOnce
from sftmix.training.loop import Stage as TrainingStage
from sftmix.training.loop import StageResult, train

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """What a stage has made: its files, relative to its directory, its figures, and a line for people."""

    files: Sequence[str]
    figures: Mapping[str, Any] = field(default_factory=dict)
    line: str = ""


Make = Callable[[], Made]
"""The work of a stage: it makes the files. All ranks call it."""


@dataclass
class RunContext:
    """One run in progress; `enter` is the runner of its stages."""

    config: RunConfig
    world: World
    directory: RunDirectory
    stop: StopAtOnce
    rows: RunRows

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def enter(self, stage: str, make: Make, read: Callable[[], T]) -> T:
        """Make a stage unless it is done, and return what its files hold.

        stage  its name, by which `STAGE_INPUTS` has its inputs
        read   returns what the files hold, on all ranks; a finished stage is read back if all its inputs are equal
        Raises the errors of `RunDirectory.begin` before anything is written, Stopped if a signal came before.
        """
        self.stop.check(self.world)
        inputs = STAGE_INPUTS[stage](Known(self.config, self.world, self.rows, self.directory.path))
        done = self.directory.begin(stage, inputs)
        memory, began, file = PeakMemory(self.world.device), time.time(), self.directory.path / "config.yaml"
        self.world.on_main(lambda: None if done and file.exists() else write_text(file, self.config.yaml()))
        if done:
            return read()
        made = make()
        value = read()  # before the stage is done: what cannot be read must not count as done
        figures = {"wall_seconds": time.time() - began, **made.figures}
        self.directory.finish(stage, made.files, {**figures, "peak_memory_bytes": self.world.max(memory.bytes())})
        if made.line:
            self.say(f"{made.line} ({time.time() - began:.0f} s)")
        return value

    def train(self, stage: TrainingStage) -> StageResult:
        """Train to the end, from the newest valid checkpoint on."""
        return train(stage, self.world)
