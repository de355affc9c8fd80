"""The run of the training loop that the pipeline lends to a Reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from sftmix.components.objectives import NTP
from sftmix.config.text import check_same_windows
from sftmix.data import EncodedDataset, Encoder, encoder_for
from sftmix.dynamics import ScoreAtCheckpoints, checkpoint_steps
from sftmix.models import load_tokenizer
from sftmix.options import ReferenceModel, ReferenceTraining, TrainingOptions
from sftmix.rng import stable_hash
from sftmix.training.loop import train
from sftmix.types import TrainingDynamics

if TYPE_CHECKING:
    from sftmix.pipeline import Run


class ReferenceRun:
    """The ReferenceContext that the pipeline lends: one NTP run of the training loop with scoring."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.ids = run.data.train.ids
        self.figures: dict[str, Any] = {}

    def train_and_score(
        self,
        *,
        model: ReferenceModel | None,
        training: ReferenceTraining | None,
        checkpoints: int | Sequence[float],
        token_nll: bool,
    ) -> TrainingDynamics:
        run, config = self._run, self._run.config
        model = model or ReferenceModel()
        path, encoder, data = self._data(model)
        options, seed = inherit(config.training, training), config.seed
        if training is not None and training.seed is not None:
            seed = training.seed
        stage = run.stage(
            "reference",
            model_path=path,
            encoder=encoder,
            data=data,
            objective=NTP(),
            options=options,
            pairs_of=lambda epoch: None,
            seed=stable_hash(seed, "reference") % 2**62,
            token_nll=token_nll,
        )
        steps = checkpoint_steps(checkpoints, stage.order.total_steps)
        if isinstance(checkpoints, int) and len(steps) < checkpoints:
            run.say(f"reference: {stage.order.total_steps} steps are fewer than {checkpoints} checkpoints: each is one")
        scoring = ScoreAtCheckpoints(ids=data.ids, steps=steps, directory=stage.directory / "scores", world=run.world)
        result = train(replace(stage, callbacks=[scoring, *config.callbacks]), run.world)
        self.figures = {**result.figures, "scoring_seconds": scoring.seconds}
        return scoring.dynamics()

    def _data(self, model: ReferenceModel) -> tuple[str, Encoder, EncodedDataset]:
        """Model path, encoder and rows of the reference: the target's own, or its own tokenizer's."""
        run, config = self._run, self._run.config
        if not (model.path or model.template or model.max_length):
            return config.model.path, run.encoder, run.data.train
        path = model.path or config.model.path
        template = model.template if model.path else model.template or config.data.template
        encoder = encoder_for(load_tokenizer(path), replace(config.data, template=template))
        length = model.max_length
        if run.prepared.text:
            length = run.data.report.max_length
            check_same_windows(model, encoder, run.encoder, length)
        ids = run.data.train.ids  # what the target dropped is not the reference's, either
        data = run.encode(encoder, path, length, key="reference.model.max_length", keep=ids)
        run.say("\n".join(f"reference ({path}): {line}" for line in data.report.lines()))
        return path, encoder, data.train


def inherit(training: TrainingOptions, own: ReferenceTraining | None) -> TrainingOptions:
    """The run's training options with what the reference sets itself."""
    names = {f.name for f in fields(TrainingOptions)}
    given = {k: v for k, v in asdict(own).items() if k in names and v is not None} if own else {}
    return replace(training, **given)
