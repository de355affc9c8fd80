"""The run of the training loop that the pipeline lends to a Reference."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any, Literal

from sftmix.batches.order import TrainingOrder
from sftmix.common.errors import ConfigError
from sftmix.common.rng import stable_hash
from sftmix.components.objectives import NTP
from sftmix.config import RunConfig
from sftmix.config.text import check_same_windows
from sftmix.data import EncodedDataset, Encoder, encoder_for
from sftmix.model.load import load_tokenizer
from sftmix.options import ReferenceModel, ReferenceTraining, TrainingOptions, reference_lora
from sftmix.pipeline.context import RunContext
from sftmix.training.dynamics import ScoreAtCheckpoints, checkpoint_notes, checkpoint_steps, merge, one_checkpoint
from sftmix.training.loop import Stage, train
from sftmix.training.online import OnlineLosses
from sftmix.types import TrainingDynamics


class ReferenceRun:
    """The ReferenceContext that the pipeline lends: one NTP run of the training loop with scoring."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self.ids = run.data.train.ids
        self.figures: dict[str, Any] = {}

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
        path, encoder, data = self.rows_of(model)
        seed = config.seed if training is None or training.seed is None else training.seed
        options, seed = inherit(config.training, training), stable_hash(seed, "reference") % 2**62
        with _named("reference.model.path" if model.path else "model.path"):
            stage = run.stage(
                "reference",
                model_path=path,
                lora=reference_lora(config.model, model),
                encoder=encoder,
                data=data,
                objective=NTP(),
                options=options,
                order=TrainingOrder(len(data), lambda epoch: None, options=options, seed=seed),
                seed=seed,
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
        result = train(replace(stage, callbacks=[scoring, *config.callbacks]), run.world)
        self.figures = {**result.figures, "scoring_seconds": scoring.seconds}
        return scoring.dynamics()

    def _online(self, stage: Stage, ids: Sequence[str]) -> TrainingDynamics:
        """Dynamics of the losses that the examples had while they were trained on, one checkpoint per full epoch."""
        losses = OnlineLosses(ids, stage.directory / "online", self._run.world)
        result = train(replace(stage, callbacks=self._run.config.callbacks, online=losses), self._run.world)
        self.figures = dict(result.figures)
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
        with _named("reference.paths"):
            _, encoder, data = self.rows_of(model, option="reference")
        parts = []
        for number, name in enumerate(paths, start=1):
            run.say(f"reference: {name} scores {len(data):,} examples")
            with _named("reference.paths"):
                score = run.scoring("reference", name, encoder=encoder, packed=data.packed, token_nll=token_nll)
            parts.append(one_checkpoint(data.ids, number, score(data)))
            del score  # its model, before the next one comes
        self.figures = {"scoring_seconds": time.perf_counter() - started}
        return merge(parts)

    def rows_of(self, model: ReferenceModel, option: str = "reference.model") -> tuple[str, Encoder, EncodedDataset]:
        """Model path, encoder and rows of the reference: the target's own, or its own tokenizer's."""
        run, config = self._run, self._run.config
        if not (model.path or model.template or model.max_length):
            return config.model.path, run.encoder, run.data.train
        path = model.path or config.model.path
        template = model.template if model.path else model.template or config.data.template
        with _named("reference.model.path" if model.path and option == "reference.model" else "model.path"):
            encoder = encoder_for(load_tokenizer(path), replace(config.data, template=template))
        length = model.max_length
        if run.prepared.text:
            length = run.data.report.max_length
            check_same_windows(model, encoder, run.encoder, length)
        ids = run.data.train.ids  # what the target dropped is not the reference's, either
        data = run.encode(encoder, path, length, key=f"{option}.max_length", keep=ids)
        run.say("\n".join(f"reference ({path}): {line}" for line in data.report.lines()))
        return path, encoder, data.train


@contextmanager
def _named(option: str) -> Iterator[None]:
    """What is wrong with a model is said of the option that names it."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        if option == "model.path" or not text.startswith("model.path:"):
            raise
        raise ConfigError(f"{option}{text.removeprefix('model.path')}") from error


def training_of_reference(config: RunConfig) -> tuple[TrainingOptions, int]:
    """Options and seed that the reference trains with; the run's own where it has none (`reference.training`)."""
    own = getattr(config.reference, "training", None)
    if not isinstance(own, ReferenceTraining):
        return config.training, config.seed
    return inherit(config.training, own), config.seed if own.seed is None else own.seed


def inherit(training: TrainingOptions, own: ReferenceTraining | None) -> TrainingOptions:
    """The run's training options with what the reference sets itself; of two that exclude each other, only its own."""
    names = {f.name for f in fields(TrainingOptions)}
    given = {k: v for k, v in asdict(own).items() if k in names and v is not None} if own else {}
    sizes = ("micro_batch_size", "micro_batch_tokens")
    if any(name in given for name in sizes):
        given = dict.fromkeys(sizes) | given
    return replace(training, **given)
