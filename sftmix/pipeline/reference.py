"""The stage of the reference, and the run of the training loop that it lends to a Reference."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from sftmix.batches.order import TrainingOrder
from sftmix.common.errors import ConfigError, DataError
from sftmix.common.rng import stable_hash
from sftmix.common.tables import read_dynamics, write_dynamics
from sftmix.components.base import Callback, Need
from sftmix.components.contracts import check_dynamics
from sftmix.components.objectives import NTP
from sftmix.components.reference import TrainedReference
from sftmix.config import RunConfig
from sftmix.data import EncodedDataset, Encoder
from sftmix.measure.remarks import ends_of_loss
from sftmix.model.paths import named
from sftmix.options import ReferenceModel, ReferenceTraining, reference_lora
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.identity import reference_inputs
from sftmix.pipeline.models import scoring_model
from sftmix.pipeline.reference_rows import rows_of_reference
from sftmix.pipeline.rows import RunRows
from sftmix.pipeline.stages import training_with
from sftmix.pipeline.target import training_stage
from sftmix.training.dynamics import (
    ScoreAtCheckpoints,
    checkpoint_notes,
    checkpoint_steps,
    described,
    merge,
    one_checkpoint,
    tell_lost,
)
from sftmix.training.loop import Stage
from sftmix.training.online import OnlineLosses
from sftmix.types import TrainingDynamics

MAX_UNSCORED = 0.05
"""Largest share of examples that a reference may fail to score before the run stops with exit code 3."""


def reference_dynamics(run: RunContext, rows: RunRows) -> TrainingDynamics:
    """Return the training dynamics of the reference, one row per example of the training set."""
    config, world, ids = run.config, run.world, rows.data.train.ids
    path = run.directory.path / "confidence" / "dynamics.parquet"
    if run.begin("reference", reference_inputs(run.known(rows))):
        return read_dynamics(path).of(ids)
    context = ReferenceRun(run, rows)
    dynamics = check_dynamics(config.reference, config.reference.collect(context)).of(ids)
    _refuse_if_unscored(run, dynamics)
    world.on_main(lambda: write_dynamics(path, dynamics))
    written = read_dynamics(path).of(ids)  # before the stage is done: what cannot be read must not count as done
    figures = {**context.figures, "wall_seconds": run.seconds(), "checkpoints": written.steps.tolist()}
    run.finish("reference", ["../confidence/dynamics.parquet"], figures)
    by = "" if Need.TRAINING in config.reference.needs else f" {type(config.reference).__name__}"
    run.say(f"reference{by}: {described(written)} ({figures['wall_seconds']:.0f} s)")
    return written


def refuse_responses_of_text(config: RunConfig, rows: RunRows) -> None:
    """Raise ConfigError for a reference that is to score responses without instructions where there are neither."""
    if rows.prepared.text and isinstance(config.reference, TrainedReference) and config.reference.response_alone:
        raise ConfigError(
            "reference.response_alone scores each response without its instruction, and data.format text has no "
            "instructions; leave it out"
        )


def _refuse_if_unscored(run: RunContext, dynamics: TrainingDynamics) -> None:
    missing = [i for i, ok in zip(dynamics.ids, dynamics.scored, strict=True) if not ok]
    if len(missing) > MAX_UNSCORED * len(dynamics.ids):
        raise DataError(
            f"the reference could not score {len(missing)} of {len(dynamics.ids)} examples (first: {missing[:5]}): "
            "raise reference.model.max_length if no response token is left, or give a file that holds them"
        )
    if missing:
        run.say(f"confidence: {len(missing)} examples the reference could not score stay unpaired: {missing[:5]}")


class ReferenceRun:
    """The pipeline's ReferenceContext: one NTP run of the training loop with scoring."""

    def __init__(self, run: RunContext, rows: RunRows) -> None:
        self._run, self._rows = run, rows
        self.ids = rows.data.train.ids
        self.figures: dict[str, Any] = {}

    def content_hashes(self) -> list[str]:
        return self._rows.data.train.content_hashes()

    def train_and_score(
        self,
        *,
        model: ReferenceModel | None,
        training: ReferenceTraining | None,
        checkpoints: int | Sequence[float] | Literal["online"],
        token_nll: bool = False,
        response_alone: bool = False,
    ) -> TrainingDynamics:
        run, config = self._run, self._run.config
        model = model or ReferenceModel()
        path, encoder, data = self._rows_of(model)
        options, seed = training_with(config, training)
        seed = stable_hash(seed, "reference") % 2**62
        with named("reference.model.path" if model.path else "model.path"):
            stage = training_stage(
                run,
                "reference",
                encoder,
                data,
                model_path=path,
                lora=reference_lora(config.model, model),
                options=options,
                seed=seed,
                objective=NTP(),
                order=TrainingOrder(len(data), lambda epoch: None, options=options, seed=seed),
                token_nll=token_nll,
            )
        if checkpoints == "online":
            return self._online(stage, data.ids)
        steps = checkpoint_steps(checkpoints, stage.order.total_steps)
        for note in checkpoint_notes(checkpoints, stage.order.total_steps):
            run.say(f"reference: {note}")
        scoring = ScoreAtCheckpoints(
            ids=data.ids, steps=steps, directory=stage.directory / "scores", world=run.world, alone=response_alone
        )
        result = run.train(replace(stage, callbacks=[scoring, *self._callbacks()]))
        self.figures = {**result.figures, **self._ends_of_loss(stage), "scoring_seconds": scoring.seconds}
        return scoring.dynamics()

    def _callbacks(self) -> list[Callback]:
        """List the callbacks that may have something to do in a stage without held-out rows."""
        return [callback for callback in self._run.config.callbacks if Need.HELD_OUT not in callback.needs]

    def _ends_of_loss(self, stage: Stage) -> dict[str, float]:
        return self._run.world.on_main(lambda: ends_of_loss(stage.directory)) or {}

    def _online(self, stage: Stage, ids: Sequence[str]) -> TrainingDynamics:
        """Train, and return the dynamics of the examples' own training losses, one checkpoint per full epoch."""
        losses = OnlineLosses(ids, stage.directory / "online", self._run.world)
        result = self._run.train(replace(stage, callbacks=self._callbacks(), online=losses))
        self.figures = {**result.figures, **self._ends_of_loss(stage)}
        if not losses.epochs():
            raise ConfigError(
                "reference.checkpoints is online, but no epoch of the reference is whole; raise training.epochs or "
                "training.max_steps (or those of reference.training), or give a number of checkpoints"
            )
        return merge([losses.read(epoch) for epoch in losses.epochs()])

    def score_models(
        self, paths: Sequence[str], *, template: str | None, max_length: int | None, token_nll: bool = False
    ) -> TrainingDynamics:
        run, started = self._run, time.perf_counter()
        model = ReferenceModel(path=paths[0], template=template, max_length=max_length)
        with named("reference.paths"):
            _, encoder, data = self._rows_of(model, option="reference")
        parts = []
        for number, name in enumerate(paths, start=1):
            run.say(f"reference: {name} scores {len(data):,} examples")
            with named("reference.paths"):
                score = scoring_model(
                    run.config, run.world, name, encoder, name="reference", packed=data.packed, token_nll=token_nll
                )
            scores = score(data)
            parts.append(one_checkpoint(data.ids, number, scores))
            if run.world.is_main:
                tell_lost(parts[-1], scores.n_tokens, f"reference {name}")
            del score  # its model, before the next one comes
        self.figures = {"scoring_seconds": time.perf_counter() - started}
        return merge(parts)

    def _rows_of(self, model: ReferenceModel, option: str = "reference.model") -> tuple[str, Encoder, EncodedDataset]:
        path, encoder, data, notes = rows_of_reference(
            self._run.config, self._rows, model, self._run.world, option=option
        )
        for note in notes:
            self._run.say(note)
        return path, encoder, data
