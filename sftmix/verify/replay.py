"""Steps of a run, made again by the run's own functions in a directory beside it, which is removed afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sftmix.common.checkpoints import BEST, CHECKPOINTS, step_path
from sftmix.common.world import World
from sftmix.components.base import Callback, CallbackResult, StageState
from sftmix.components.callbacks import Evaluate
from sftmix.components.mixing import MeasureMixing
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.directory import RunDirectory, origin
from sftmix.pipeline.recipe import make_stages
from sftmix.pipeline.stages import ALL, stages_needed
from sftmix.training.log import PeakMemory, StopAtOnce
from sftmix.training.loop import Stage, StageResult
from sftmix.verify.inputs import Inputs
from sftmix.verify.window import Window, logged_steps

HEAVY = (CHECKPOINTS, BEST, "model")
"""Folders of a finished stage that no later stage reads."""
OBSERVED = (Evaluate, MeasureMixing)
"""Callbacks that only watch and whose figures are compared. Others that only watch, as trackers, are left out: they
would tell the world of the steps a second time."""


@dataclass(frozen=True)
class Replayed:
    """The end of a replay.

    stage, module  the stage that was replayed, and its trained (wrapped) module
    logged         step -> its line in the replay's metrics.jsonl
    """

    stage: Stage
    module: torch.nn.Module
    logged: Mapping[int, Mapping[str, Any]]


@contextmanager
def beside(world: World) -> Iterator[Path]:
    """Yield an empty directory that all ranks of this machine share; it is removed at the end."""
    place = Path(world.share(world.on_main(lambda: tempfile.mkdtemp(prefix="sftmix-verify-"))))
    try:
        yield place
        world.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(place, ignore_errors=True)


def replay(window: Window, inputs: Inputs, world: World, place: Path) -> Replayed:
    """Make the steps of the window again, in the directory `place`; nothing is written into the run."""
    world.on_main(lambda: lay_out(window, place))
    config = replace(inputs.config, out=str(place))
    with RunDirectory(place, world) as directory, StopAtOnce() as stop:
        run = _ReplayContext(window, config, world, directory, stop)
        try:
            make_stages(run, inputs.rows, stages_needed(config, "train") | {window.stage})
        except _Over as over:
            return Replayed(over.stage, over.result.module, logged_steps(place / window.stage))
    raise AssertionError(f"{window.stage} was not entered")


def lay_out(window: Window, place: Path) -> None:
    """Link into `place` what the stages read: finished stages without their weights, and the checkpoint to start from.

    Links of single files, in directories of their own, so that a file made here never replaces one of the run.
    """
    for stage in ALL:
        source = origin(window.run / stage)
        if stage == window.stage:
            files = [source / "inputs.json", *_made_before(window)]
        else:
            files = [f for f in source.rglob("*") if f.is_file() and f.relative_to(source).parts[0] not in HEAVY]
        for file in files:
            _link(file, place / stage / file.relative_to(source))
    if window.start:
        target = step_path(place / window.stage / CHECKPOINTS, window.start)
        target.parent.mkdir(parents=True)
        target.symlink_to(window.checkpoint(window.start).absolute(), target_is_directory=True)


def _made_before(window: Window) -> list[Path]:
    """List the losses and scores of the examples that the stage had made before the window."""
    scores = [step_path(window.place / "scores", step).with_suffix(".parquet") for step in range(window.start + 1)]
    online = sorted((window.place / "online").glob("epoch-*.parquet"))  # the replay replaces those that it makes
    return [*(file for file in scores if file.exists()), *online]


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(file.absolute())


class _Over(Exception):
    """The window is replayed; what was to come after it in the run does not."""

    def __init__(self, stage: Stage, result: StageResult) -> None:
        super().__init__(stage.name)
        self.stage, self.result = stage, result


class _ReplayContext(RunContext):
    """A run whose stages count as done but for one, of which a few steps are made and no checkpoint."""

    def __init__(self, window: Window, *about: Any) -> None:
        super().__init__(*about)
        self._window = window

    def begin(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        self._stop.check(self.world)
        self.memory = PeakMemory(self.world.device)
        return stage != self._window.stage

    def train(self, stage: Stage) -> StageResult:
        watching = [one for one in stage.callbacks if isinstance(one, OBSERVED) or not one.observer]
        unsaved = replace(stage.checkpoint, every=0, keep_best=False, keep=2)  # 2: the link is never pruned
        callbacks = [*watching, _StopAfter(self._window.end)]
        raise _Over(stage, super().train(replace(stage, callbacks=callbacks, checkpoint=unsaved)))


class _StopAfter(Callback):
    """The end of a replay."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        return CallbackResult(stop=True) if state.step >= self._step else None
