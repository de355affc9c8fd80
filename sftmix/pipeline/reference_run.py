"""What a run lends to its Reference: training, and scoring by models or row by row."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np

from sftmix.batches.order import ResponsesAlone, TokenisedRows, TrainingOrder
from sftmix.config.wants import Wants
from sftmix.data import EncodedDataset
from sftmix.disk.hashes import sha256_json
from sftmix.measure.model import ends_of_loss
from sftmix.model.paths import named
from sftmix.options.reference import ReferenceModel
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.inputs import config_of_reference
from sftmix.pipeline.loaded import scoring_model
from sftmix.pipeline.row_scores import score_each
from sftmix.pipeline.rows import check_rows_fit, check_same_ids, rows_of_reference
from sftmix.ranks.rng import stable_hash
from sftmix.training.dynamics import (
    OnlineLosses,
    ScoreAtCheckpoints,
    checkpoint_steps,
    merge_dynamics,
    one_checkpoint,
)
from sftmix.types import RowLosses, RowScorer, TrainingDynamics
from sftmix.words.errors import ConfigError

NO_EPOCH = (
    "reference.checkpoints is online, but no epoch of the reference is whole; raise training.epochs or "
    "training.max_steps (or those of reference.training), or give a number of checkpoints"
)


class ReferenceRun:
    """The pipeline's ReferenceContext (`sftmix.components.base`): training with scoring, or scoring alone.

    ids             of the target's training rows; a reference scores these and no others
    content_hashes  function: the hash of each example's turns, in row order
    figures         of the stage, once one of the methods has trained or scored
    """

    def __init__(self, run: RunContext) -> None:
        self._run, self._reference, self.ids = run, run.config.reference, run.rows.data.train.ids
        self.content_hashes = run.rows.data.train.content_hashes
        self._rows = partial(rows_of_reference, run.config, run.rows, world=run.world, say=run.say)
        self.figures: dict[str, Any] = {}

    def train_and_score(self, checkpoints: int | Sequence[float] | Literal["online"]) -> TrainingDynamics:
        """Train by NTP, in an order of its own, and score every example at the checkpoints.

        Online, nothing is scored: the losses of whole epochs are taken from the training steps.
        """
        run, model = self._run, self._reference.model or ReferenceModel()
        encoder, data = self._rows(model)
        config = config_of_reference(run.config)
        # Its order and dropout masks are none of the target's.
        config.seed = stable_hash(config.seed, "reference") % 2**62
        with named("reference.model.path" if model.path else "model.path"):
            stage = run.training_stage(
                "reference",
                config,
                encoder,
                data=data,
                order=TrainingOrder(len(data), options=config.training, seed=config.seed),
                keep=self._kept,
                packed=data.packed,
            )
        if checkpoints == "online":
            # max_steps, or epochs below 1, end before each example had its turn.
            if stage.order.ends[0] * config.training.global_batch_size < len(data):
                raise ConfigError(NO_EPOCH)
            stage.online = OnlineLosses(data.ids, stage.directory / "online", run.world)
        else:
            steps = checkpoint_steps(checkpoints, stage.order.total_steps)
            scoring = ScoreAtCheckpoints(
                ids=data.ids,
                steps=steps,
                directory=stage.directory / "scores",
                world=run.world,
                alone=self._reference.response_alone,
            )
            stage.callbacks = [scoring, *stage.callbacks]  # first: those behind it see its train_nll
        figures = run.train(stage).figures
        self.figures = {**figures, **run.world.from_main(lambda: ends_of_loss(stage.directory))}
        if stage.online is None:
            self.figures["scoring_seconds"] = scoring.seconds
            return scoring.dynamics()
        if not (epochs := run.world.from_main(stage.online.epochs)):  # a callback may have ended it
            raise ConfigError(NO_EPOCH)
        return merge_dynamics([stage.online.read(epoch) for epoch in epochs])

    def score_models(self, paths: Sequence[str], *, model: ReferenceModel) -> TrainingDynamics:
        """Score every example by each of the models in turn, one in memory at a time; all read the first one's rows."""
        run, kept = self._run, self._kept

        def scorer_of(number: int, path: str) -> Callable[[TokenisedRows], RowLosses]:
            score, module = scoring_model(
                run.config, run.world, path, encoder, name="reference", packed=data.packed, keep=kept
            )
            return partial(score, module)

        with named("reference.paths"):
            encoder, data = self._rows(replace(model, path=paths[0]), key="reference.paths")
            for path in paths:
                check_rows_fit(path, encoder, data)
            for path in paths[1:]:
                run.world.node_first(partial(check_same_ids, path, encoder))
            return self._checkpoints(data, paths, scorer_of)

    def score_rows(
        self, scorers: Mapping[str, Callable[[Any], RowScorer]], *, model: ReferenceModel, threads: int = 1
    ) -> TrainingDynamics:
        """Score every example by functions of a row, on rank 0; the file of each holds what was scored so far."""
        run = self._run
        encoder, data = self._rows(model, key="reference.tokenizer")
        if data.packed:
            raise ConfigError(
                "a reference that scores single rows cannot keep apart what is packed into windows: set data.packing "
                "false for plain text, or renderer to null"
            )

        def collected() -> TrainingDynamics:
            ready = {name: connect(encoder.tokenizer) for name, connect in scorers.items()}

            spec, token_nll = self._reference.spec(), self._reference.token_nll
            for option in self._reference.changeable:
                spec["init_args"].pop(option, None)

            def scorer_of(number: int, name: str) -> Callable[[TokenisedRows], RowLosses]:
                of = sha256_json([spec, name, data.fingerprint])

                def scores_of(rows: TokenisedRows) -> RowLosses:
                    ending = "-alone" if isinstance(rows, ResponsesAlone) else ""
                    file = run.path / "reference" / f"scores-{number}{ending}.jsonl"
                    return score_each(ready[name], file, rows, of=of, threads=threads, token_nll=token_nll)

                return scores_of

            return self._checkpoints(data, list(ready), scorer_of)

        return run.world.from_main(collected)

    def _checkpoints(
        self,
        data: EncodedDataset,
        names: Sequence[str],
        scorer_of: Callable[[int, str], Callable[[TokenisedRows], RowLosses]],
    ) -> TrainingDynamics:
        """Score the rows by one model after the other, each a checkpoint, whose number counts from 1."""
        rows: list[TokenisedRows] = [data]
        if self._reference.response_alone:
            rows.append(ResponsesAlone(data, np.arange(len(data))))
        parts = []
        started = time.perf_counter()
        for number, name in enumerate(names, start=1):
            self._run.say(f"reference: {name} scores {len(data):,} examples")
            parts.append(one_checkpoint(data.ids, number, *map(scorer_of(number, name), rows)))
        self.figures = {"scoring_seconds": time.perf_counter() - started}
        return merge_dynamics(parts)

    @property
    def _kept(self) -> list[str]:
        """What a scorer keeps of each row beside its sums: what is asked for, and what components need."""
        words = sorted({*(self._reference.keep or ()), *Wants(self._run.config).kept})
        return ["token_nll", *words] if self._reference.token_nll else words
