"""Steps of a run, made again by the run's own functions in a directory beside it, which is removed afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sftmix.common.checkpoints import BEST, CHECKPOINTS, step_path
from sftmix.common.world import World
from sftmix.components.base import Callback, CallbackResult, Need, StageState
from sftmix.components.callbacks import Evaluate
from sftmix.components.mixing import MeasureMixing
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.recipe import make_stages
from sftmix.pipeline.stages import ALL, stages_needed
from sftmix.tools.verify.inputs import Inputs
from sftmix.tools.verify.window import Window, logged_steps
from sftmix.training.log import StopAtOnce
from sftmix.training.loop import Stage, StageResult
from sftmix.training.machine import machine_of, same_bits

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
    machine        that of the replay
    exact          True if it gives the same bits as the machines of the run
    before         the weights before the first step, where they are needed and no checkpoint holds them
    """

    stage: Stage
    module: torch.nn.Module
    logged: Mapping[int, Mapping[str, Any]]
    machine: Mapping[str, Any]
    exact: bool
    before: Mapping[str, torch.Tensor] | None


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


def replay(
    window: Window, inputs: Inputs, world: World, place: Path, recorded: Sequence[Mapping[str, Any]]
) -> Replayed:
    """Make the steps of the window again, in the directory `place`; nothing is written into the run.

    recorded  the machines that made them in the run
    """
    world.on_main(lambda: lay_out(window, place))
    config = replace(inputs.config, out=str(place))
    with RunDirectory(place, world) as directory, StopAtOnce() as stop:
        run = _ReplayContext(window, recorded, config, world, directory, stop)
        try:
            make_stages(run, inputs.rows, stages_needed(config, "train") | {window.stage})
        except _Over as over:
            return over.replayed
    raise AssertionError(f"{window.stage} was not entered")


def lay_out(window: Window, place: Path) -> None:
    """Link into `place` what the stages read: finished stages without their weights, and the checkpoint to start from.

    Links of single files, in directories of their own, so that a file made here never replaces one of the run.
    """
    for stage in ALL:
        source = window.run / stage
        if stage == window.stage:
            files = {"inputs.json": window.identity, **_made_before(window)}
        else:
            inside = {f.relative_to(source): f for f in source.rglob("*") if f.is_file()}
            files = {str(name): file for name, file in inside.items() if name.parts[0] not in HEAVY}
        for name, file in files.items():
            link(file, place / stage / name)
    if window.start:
        target = step_path(place / window.stage / CHECKPOINTS, window.start)
        target.parent.mkdir(parents=True)
        target.symlink_to(window.checkpoint(window.start).absolute(), target_is_directory=True)


def _made_before(window: Window) -> dict[str, Path]:
    """Find what the stage had made before the window, by the names in it: scores and losses of examples, and its log.

    The loop writes the log anew, without the steps that come after the checkpoint.
    """
    scores = [step_path(window.file("scores"), step).with_suffix(".parquet") for step in range(window.start + 1)]
    online = sorted(window.file("online").glob("epoch-*.parquet"))  # the replay replaces those that it makes
    examples = {f"{file.parent.name}/{file.name}": file for file in (*scores, *online) if file.exists()}
    log = window.file("metrics.jsonl")
    return {**examples, log.name: log} if window.start and log.exists() else examples


def link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(file.absolute())


class _Over(Exception):
    """The window is replayed; what was to come after it in the run does not."""

    def __init__(self, replayed: Replayed) -> None:
        super().__init__(replayed.stage.name)
        self.replayed = replayed


class _ReplayContext(RunContext):
    """A run whose stages count as done but for one, of which a few steps are made and no checkpoint."""

    def __init__(self, window: Window, recorded: Sequence[Mapping[str, Any]], *about: Any) -> None:
        super().__init__(*about)
        self._window, self._recorded = window, recorded

    def begin(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        self._stop.check(self.world)
        return stage != self._window.stage

    def train(self, stage: Stage) -> StageResult:
        watching = [one for one in stage.callbacks if isinstance(one, OBSERVED) or Need.STOP in one.gives]
        unsaved = replace(stage.checkpoint, every=0, keep_best=False, keep=2)  # 2: the link is never pruned
        callbacks = [*watching, _StopAfter(self._window.end)]
        machine = machine_of(self.world, stage.options)
        exact = same_bits(self._recorded, machine)
        before = None
        if not exact and self._window.start == 0 and stage.values is None:
            before = {name: tensor.detach().cpu().clone() for name, tensor in stage.model.state_dict().items()}
        module = super().train(replace(stage, callbacks=callbacks, checkpoint=unsaved)).module
        raise _Over(Replayed(stage, module, logged_steps(stage.directory), machine, exact, before))


class _StopAfter(Callback):
    """The end of a replay."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        return CallbackResult(stop=True) if state.step >= self._step else None
