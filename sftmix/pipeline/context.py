"""A stage as one record, and RunContext, which makes the stages of a run or reads them back.

Importing this module imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sftmix.config import RunConfig
from sftmix.config.wants import Wants
from sftmix.disk.hashes import sha256_file
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.inputs import HASHES, Known
from sftmix.pipeline.validity import Inputs, refuse_stage
from sftmix.words.errors import ConfigError

if TYPE_CHECKING:
    from sftmix.batches.order import TrainingOrder
    from sftmix.data import EncodedDataset
    from sftmix.pipeline.rows import RunRows
    from sftmix.ranks.world import World
    from sftmix.text.encoder import Encoder
    from sftmix.training.callback_state import AsBuilt
    from sftmix.training.loop import StageResult
    from sftmix.training.signals import StopSignal
    from sftmix.training.step import Stage

Values = dict[str, Any]
"""Name of a stage -> its value, of all stages before."""


class Made(NamedTuple):
    """What a stage has made: its files, relative to its directory, its figures, and a line for people."""

    files: Sequence[str]
    figures: Mapping[str, Any] = {}
    line: str = ""


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """A stage: when it is made, from what, how, and how it is read back.

    name       its directory in the run directory
    wanted     what a command wants -> True if the stage is made or read back
    inputs     what is known -> what the stage is made from, as values of JSON; it is read back only if all are equal
    make       makes its files
    read       returns their value, for later stages, on every rank; called whether the stage was made now or earlier
    words      input whose value is a hash -> what a refusal says if it differs; [HASHES]
    result     the file that a command which ends with this stage names; "": no command ends with it
    by_ranks   True: every rank calls `make`, as they share its work; False: rank 0 calls it
    has_steps  True if it trains, and so has a metrics.jsonl
    version    raised by a release that makes other files of the same inputs, whose earlier directories it refuses
    """

    name: str
    wanted: Callable[[Wants], bool]
    inputs: Callable[[Known], Inputs]
    make: Callable[[RunContext, Values], Made]
    read: Callable[[RunContext, Values], Any] = lambda run, values: None
    words: Mapping[str, str] = field(default_factory=lambda: HASHES)
    result: str = ""
    by_ranks: bool = False
    has_steps: bool = False
    version: int = 1

    def identity(self, known: Known) -> Inputs:
        """Return what decides whether the stage is read back: its inputs, and its version."""
        inputs = self.inputs(known)
        if "version" in inputs:
            raise ConfigError(f"stage {self.name}: version is no key of `inputs`; write StageSpec(version=...)")
        return {"version": self.version, **inputs}

    def among(self, stages: Sequence[StageSpec]) -> StageSpec:
        """Return the stage as it is among all stages of a run."""
        return self

    def enter(self, run: RunContext, values: Values) -> Any:
        """Make the stage, or read it back, and return its value."""
        return run.make_or_read(self, values)

    def make_on_ranks(self, run: RunContext, values: Values) -> Made:
        """Make the files, and return on every rank what was made."""
        return self.make(run, values) if self.by_ranks else run.world.from_main(lambda: self.make(run, values))


def refuse_other_inputs(known: Known, stages: Sequence[StageSpec], directory: Path) -> None:
    """Raise ConfigError if one of the stages was made, or begun, from other inputs.

    Every stage is compared as far as its inputs are known, before the first one is made: a refusal changes nothing.
    """
    for stage in stages:
        refuse_stage(directory / stage.name, stage.identity(known), stage.words)


@dataclass
class RunContext:
    """One run in progress; `make_or_read` is the runner of its stages.

    config     the configuration, with the format of the rows settled
    world      the ranks of the run, which call each method together
    directory  the run directory, which is held
    stop       the signals that end the run between two stages
    rows       training and held-out rows, as the target sees them
    """

    config: RunConfig
    world: World
    directory: RunDirectory
    stop: StopSignal
    rows: RunRows
    _reached: list[StageSpec] = field(default_factory=list, init=False)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @cached_property
    def _as_built(self) -> AsBuilt:
        """The callbacks as they are before the first stage that this process trains."""
        from sftmix.training.callback_state import AsBuilt

        return AsBuilt(self.config.callbacks)

    def say(self, text: str) -> None:
        """Print a line on rank 0, at once."""
        if self.world.is_main:
            print(text, flush=True)

    def make_or_read(self, stage: StageSpec, values: Values) -> Any:
        """Make a stage unless it is done, and return what its files hold; all ranks call it.

        Raises the errors of `RunDirectory.begin` before anything is written, Stopped if a signal came before.
        """
        from sftmix.training.memory import PeakMemory

        self.stop.check(self.world)
        # Not sooner: it hashes files that the stages before have made.
        known = Known(self.config, self.world, self.rows, self.path)
        inputs = stage.identity(known)
        if stage.has_steps:  # hours after the stages before: a model may be another by now
            refuse_other_inputs(known, self._reached, self.path)
        self._reached.append(stage)
        memory, began = PeakMemory(self.world.device), time.time()
        if self.directory.begin(stage.name, inputs, self.config.yaml(), words=stage.words):
            if not self.directory.pool:  # the runs of a table read most stages from each other
                self.say(f"{stage.name}: done before, read back")
            return stage.read(self, values)
        made = stage.make_on_ranks(self, values)
        value = stage.read(self, values)  # before the stage is done: what cannot be read must not count as done
        seconds = time.time() - began
        figures = {"wall_seconds": seconds, **made.figures, "peak_memory_bytes": self.world.max(memory.bytes())}
        self.directory.finish(stage.name, made.files, figures)
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

        config  the stage's: its model, training options, objective, callbacks and seed
        packed  True if some rows, also held-out ones, hold several documents
        The other fields of the stage are at their defaults: set them.
        """
        from sftmix.model.load import refuse_quantized
        from sftmix.pipeline.loaded import load_for_run, make_scorer
        from sftmix.pipeline.rows import check_rows_fit
        from sftmix.training.step import Stage

        self._as_built.put()
        refuse_quantized(config.model.path)
        check_rows_fit(config.model.path, encoder, data)
        tokens = encoder.tokenizer.convert_ids_to_tokens(list(encoder.end_ids))
        model = load_for_run(config, self.world, trains=True, ends=list(zip(encoder.end_ids, tokens, strict=True)))
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
            # Of the file, which `begin` leaves as it is while the inputs are equal.
            identity=self.world.from_main(lambda: sha256_file(self.path / name / "inputs.json")),
            seed=config.seed,
            pad_id=encoder.pad_id,
            scorer=make_scorer(config.training, self.world, encoder, name=name, keep=keep),
            on_progress=lambda step, total: self.directory.status(step=step, total_steps=total, throttle=1.0),
        )

    def train(self, stage: Stage) -> StageResult:
        """Train to the end, from the newest valid checkpoint on; Stopped if a signal came after the last look."""
        from sftmix.pipeline.loaded import return_memory
        from sftmix.training.loop import train

        result = train(stage, self.world)
        return_memory()  # what is measured and written next takes its place
        self.stop.check(self.world)
        return result
