"""What a stage of a run is, and RunContext, which makes one or reads it back: configuration, ranks, run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sftmix.common.files import write_text
from sftmix.common.world import World
from sftmix.config import RunConfig
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.identity import Known
from sftmix.pipeline.rows import RunRows
from sftmix.training.log import PeakMemory, StopAtOnce
from sftmix.training.loop import Stage as TrainingStage
from sftmix.training.loop import StageResult, train

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """What a stage has made: its files, relative to its directory, its figures, and lines for people."""

    files: Sequence[str]
    figures: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Stage(Generic[T]):
    """A stage of a run. All ranks call each of its functions.

    inputs  returns what it is made from; a finished stage is read back only if all of it is equal
    make    makes its files
    read    returns what the files hold
    """

    name: str
    inputs: Callable[[], Mapping[str, Any]]
    make: Callable[[], Made]
    read: Callable[[], T]


class RunContext:
    """One run in progress; `enter` is the runner of its stages."""

    def __init__(self, config: RunConfig, world: World, directory: RunDirectory, stop: StopAtOnce) -> None:
        self.config, self.world, self.directory, self._stop = config, world, directory, stop
        self.pairing = config.resolved_pairing()
        self.memory = PeakMemory(world.device)
        """The peak of the stage that was begun last."""
        self._began = time.time()

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def known(self, rows: RunRows | None) -> Known:
        """Return what the inputs of a stage are made of, once the stages before it are done."""
        return Known(self.config, self.world, rows, self.directory.path)

    def enter(self, stage: Stage[T]) -> T:
        """Make a stage unless it is done, and return what its files hold.

        Raises the errors of `RunDirectory.begin` before anything is written, Stopped if a signal came before.
        """
        self._stop.check(self.world)
        done = self.directory.begin(stage.name, stage.inputs())
        self.memory, self._began = PeakMemory(self.world.device), time.time()
        self.world.on_main(lambda: self._write_config(keep=done))
        if done:
            return stage.read()
        made = stage.make()
        value = stage.read()  # before the stage is done: what cannot be read must not count as done
        self.finish(stage.name, made)
        for line in made.lines:
            self.say(line)
        return value

    def finish(self, stage: str, made: Made) -> None:
        """Record the files of a stage and its figures, with its seconds and the peak memory of all ranks."""
        peak = self.world.max(self.memory.bytes())
        figures = {"wall_seconds": self.seconds(), **made.figures, "peak_memory_bytes": peak}
        self.directory.finish(stage, list(made.files), figures)

    def seconds(self) -> float:
        """Return the seconds since the stage began."""
        return time.time() - self._began

    def train(self, stage: TrainingStage) -> StageResult:
        """Train to the end, from the newest valid checkpoint on."""
        return train(stage, self.world)

    def _write_config(self, *, keep: bool) -> None:
        file = self.directory.path / "config.yaml"
        if not (keep and file.exists()):
            write_text(file, self.config.yaml())
