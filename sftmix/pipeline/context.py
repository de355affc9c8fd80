"""RunContext, which makes the stages of a run or reads them back: configuration, ranks, directory, rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sftmix.batches.order import TrainingOrder
from sftmix.config import RunConfig
from sftmix.data import EncodedDataset
from sftmix.disk.hashes import sha256_file
from sftmix.model.load import refuse_quantized
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.inputs import STAGE_INPUTS, Known
from sftmix.pipeline.loaded import load_for_run, scorer
from sftmix.pipeline.rows import RunRows, check_rows_fit
from sftmix.ranks.world import World
from sftmix.text.encoder import Encoder
from sftmix.training.loop import Stage, StageResult, train
from sftmix.training.memory import PeakMemory
from sftmix.training.signals import StopAtOnce


class Made(NamedTuple):
    """What a stage has made: its files, relative to its directory, its figures, and a line for people."""

    files: Sequence[str]
    figures: Mapping[str, Any] = {}
    line: str = ""


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

    def enter(self, stage: str, make: Callable[[], Made], read: Callable[[], Any] = lambda: None) -> Any:
        """Make a stage unless it is done, and return what its files hold; all ranks call both functions.

        make  makes its files
        read  returns what they hold; a finished stage is read back if all its inputs (`STAGE_INPUTS`) are equal
        Raises the errors of `RunDirectory.begin` before anything is written, Stopped if a signal came before.
        """
        self.stop.check(self.world)
        # Not sooner: it hashes files that the stages before have made.
        inputs = STAGE_INPUTS[stage](Known(self.config, self.world, self.rows, self.path))
        memory, began = PeakMemory(self.world.device), time.time()
        if self.directory.begin(stage, inputs, self.config.yaml()):
            if not self.directory.pool:  # the runs of a table read most stages from each other
                self.say(f"{stage}: done before, read back")
            return read()
        made = make()
        value = read()  # before the stage is done: what cannot be read must not count as done
        seconds = time.time() - began
        figures = {"wall_seconds": seconds, **made.figures, "peak_memory_bytes": self.world.max(memory.bytes())}
        self.directory.finish(stage, made.files, figures)
        if made.line:
            self.say(f"{made.line} ({seconds:.0f} s)")
        return value

    def training_stage(
        self,
        name: str,
        config: RunConfig,
        encoder: Encoder,
        *,
        data: EncodedDataset,
        order: TrainingOrder,
        packed: bool,
        keep: Sequence[str] = (),
    ) -> Stage:
        """Return a training stage of this run, with its model loaded and checked.

        config  that of the stage: its model, training options, objective, callbacks and seed
        packed  True if some rows, also held-out ones, hold several documents
        The other fields of the stage are at their defaults: set them.
        """
        refuse_quantized(config.model.path)
        check_rows_fit(config.model.path, encoder, data)
        model = load_for_run(config, self.world, trains=True)
        return Stage(
            name=name,
            model=model,
            data=data,
            order=order,
            objective=config.objective,
            optimizer=config.optimizer,
            perturbation=config.perturbation,
            callbacks=config.callbacks,
            options=config.training,
            attention=config.model.attention,
            packed=packed,
            checkpoint=config.checkpoint,
            directory=self.path / name,
            # Of the file, which `begin` leaves as it is while the inputs are equal, also if a class has moved.
            identity=self.world.from_main(lambda: sha256_file(self.path / name / "inputs.json")),
            seed=config.seed,
            pad_id=encoder.pad_id,
            scorer=scorer(config.training, self.world, encoder, name=name, keep=keep),
            on_progress=lambda step, total: self.directory.status(step=step, total_steps=total, throttle=1.0),
        )

    def train(self, stage: Stage) -> StageResult:
        """Train to the end, from the newest valid checkpoint on; Stopped if a signal came after the last look."""
        result = train(stage, self.world)
        self.stop.check(self.world)
        return result
