"""What a run lends to its Reference: training, and scoring by models or row by row."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sftmix.batches.order import ResponsesAlone, TokenisedRows, TrainingOrder
from sftmix.config import RunConfig
from sftmix.data import EncodedDataset, encode_dataset
from sftmix.disk.appended import append_batch, read_batches
from sftmix.disk.files import naming_damage
from sftmix.disk.hashes import sha256_json
from sftmix.measure.remarks import ends_of_loss
from sftmix.model.load import load_tokenizer, model_config
from sftmix.model.paths import named
from sftmix.model.probes import context_length
from sftmix.options.reference import ReferenceModel, ReferenceTraining
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.inputs import config_of_reference
from sftmix.pipeline.loaded import scoring_model
from sftmix.pipeline.machines import check_same
from sftmix.pipeline.rows import RunRows, check_rows_fit, check_same_ids, resolve_max_length
from sftmix.ranks.rng import stable_hash
from sftmix.ranks.world import World
from sftmix.text.encoder import Encoder, encoder_for
from sftmix.text.templates import same_tokenizer
from sftmix.training.dynamics import (
    OnlineLosses,
    ScoreAtCheckpoints,
    checkpoint_steps,
    merge_dynamics,
    one_checkpoint,
)
from sftmix.types import RowScorer, RowScores, TrainingDynamics
from sftmix.words.errors import ConfigError, ContractError
from sftmix.words.progress import progress_bar


def rows_of_reference(
    config: RunConfig,
    rows: RunRows,
    model: ReferenceModel,
    world: World,
    *,
    key: str = "reference.model.path",
    say: Callable[[str], object] = lambda line: None,
) -> tuple[str, Encoder, EncodedDataset]:
    """Return model path, encoder and rows of a reference; lines say how it reads rows of its own.

    What is not set is the run's if the tokenizer is the target's: the confidence is then about the tokens which
    the target sees. With another tokenizer, template and length have another meaning, so they are the model's. Windows
    of plain text are always the run's, as they join by what they hold: ConfigError for a reference that would cut
    others.

    key  the option that names the model, beside the options of its template and length
    """
    path, encoder, length = model.path or config.model.path, rows.encoder, rows.data.report.max_length or 0
    if model == ReferenceModel(lora=model.lora):  # nothing set beside adapters: the rows are the target's
        return path, encoder, rows.data.train
    option = key.rpartition(".")[0]
    with named(key if model.path else "model.path"):
        tokenizer = world.node_first(lambda: load_tokenizer(path))
        same = world.share(same_tokenizer(tokenizer, rows.encoder.tokenizer))
        if model.template is not None or not same:
            data = replace(config.data, template=model.template)
            with named(f"{option}.template", "data.template"):
                encoder = world.node_first(
                    lambda: encoder_for(tokenizer, data, config.renderer, thinks=rows.prepared.thinks)
                )
        if model.max_length is None and same:
            length = min(length, context_length(model_config(path)) or length)
        else:
            length = resolve_max_length(model.max_length, path, key=f"{option}.max_length")
    say(f"reference ({path}): template {encoder.name}, max_length {length}")
    # Such as a smaller model of the target's family, whose context is long enough.
    if encoder is rows.encoder and length == rows.data.report.max_length:
        return path, encoder, rows.data.train
    if rows.prepared.text:
        raise ConfigError(
            "with data.format text a reference reads the windows of the target: leave reference.model.template and "
            "reference.model.max_length out, and use a reference with the target's tokenizer and context"
        )
    encoded = world.node_first(
        lambda: encode_dataset(
            rows.prepared,
            encoder,
            max_length=length,
            keep=rows.data.train.ids,  # what the target dropped is not the reference's, either
            progress=world.is_main,
        )
    )
    check_same(lambda: {option: encoded.train.fingerprint}, world)
    for line in encoded.report.lines():
        say(f"reference ({path}): {line}")
    return path, encoder, encoded.train


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
        self._run, self.ids = run, run.rows.data.train.ids
        self.content_hashes = run.rows.data.train.content_hashes
        self._rows = partial(rows_of_reference, run.config, run.rows, world=run.world, say=run.say)
        self.figures: dict[str, Any] = {}

    def train_and_score(
        self,
        *,
        model: ReferenceModel | None,
        training: ReferenceTraining | None,
        checkpoints: int | Sequence[float] | Literal["online"],
        token_nll: bool = False,
        response_alone: bool = False,
        keep: Sequence[str] = (),
    ) -> TrainingDynamics:
        """Train by NTP, in an order of its own, and score every example at the checkpoints.

        Online, nothing is scored: the losses of whole epochs are taken from the training steps.
        """
        run, model = self._run, model or ReferenceModel()
        _, encoder, data = self._rows(model)
        config = config_of_reference(run.config, model, training)
        # Its order and dropout masks are none of the target's.
        config.seed = stable_hash(config.seed, "reference") % 2**62
        with named("reference.model.path" if model.path else "model.path"):
            stage = run.training_stage(
                "reference",
                config,
                encoder,
                data=data,
                order=TrainingOrder(len(data), options=config.training, seed=config.seed),
                keep=_kept(token_nll, keep),
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
                alone=response_alone,
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

    def score_models(
        self,
        paths: Sequence[str],
        *,
        template: str | None,
        max_length: int | None,
        token_nll: bool = False,
        response_alone: bool = False,
        keep: Sequence[str] = (),
    ) -> TrainingDynamics:
        """Score every example by each of the models in turn, one in memory at a time; all read the first one's rows."""
        run, kept = self._run, _kept(token_nll, keep)

        def scorer_of(number: int, path: str) -> Callable[[TokenisedRows], RowScores]:
            score, module = scoring_model(
                run.config, run.world, path, encoder, name="reference", packed=data.packed, keep=kept
            )
            return partial(score, module)

        with named("reference.paths"):
            model = ReferenceModel(path=paths[0], template=template, max_length=max_length)
            _, encoder, data = self._rows(model, key="reference.paths")
            for path in paths:
                check_rows_fit(path, encoder, data)
            for path in paths[1:]:
                run.world.node_first(partial(check_same_ids, path, encoder))
            return self._checkpoints(data, paths, scorer_of, response_alone)

    def score_rows(
        self,
        scorers: Mapping[str, Callable[[Any], RowScorer]],
        *,
        model: ReferenceModel,
        threads: int = 1,
        token_nll: bool = False,
        response_alone: bool = False,
    ) -> TrainingDynamics:
        """Score every example by functions of a row, on rank 0; the file of each holds what was scored so far."""
        run = self._run
        _, encoder, data = self._rows(model, key="reference.tokenizer")
        if data.packed:
            raise ConfigError(
                "data.format text packs documents into windows, which a reference that scores single rows cannot keep "
                "apart: set data.packing false"
            )

        def collected() -> TrainingDynamics:
            ready = {name: connect(encoder.tokenizer) for name, connect in scorers.items()}

            asked = run.config.reference.spec()
            for option in run.config.reference.layout:
                asked["init_args"].pop(option, None)

            def scorer_of(number: int, name: str) -> Callable[[TokenisedRows], RowScores]:
                file = run.path / "reference" / f"scores-{number}"
                of = sha256_json([asked, name, data.fingerprint])
                return partial(score_each, ready[name], file, of=of, threads=threads, token_nll=token_nll)

            return self._checkpoints(data, list(ready), scorer_of, response_alone)

        return run.world.from_main(collected)

    def _checkpoints(
        self,
        data: EncodedDataset,
        names: Sequence[str],
        scorer_of: Callable[[int, str], Callable[[TokenisedRows], RowScores]],
        response_alone: bool,
    ) -> TrainingDynamics:
        """Score the rows by one model after the other, each a checkpoint, whose number counts from 1."""
        rows: list[TokenisedRows] = [data]
        if response_alone:
            rows.append(ResponsesAlone(data, np.arange(len(data))))
        parts = []
        started = time.perf_counter()
        for number, name in enumerate(names, start=1):
            self._run.say(f"reference: {name} scores {len(data):,} examples")
            parts.append(one_checkpoint(data.ids, number, *map(scorer_of(number, name), rows)))
        self.figures = {"scoring_seconds": time.perf_counter() - started}
        return merge_dynamics(parts)


def score_each(
    score: RowScorer, place: Path, data: TokenisedRows, *, of: str, threads: int, token_nll: bool
) -> RowScores:
    """Return the scores of all rows: those that the file has, and the others, which are added to it as they come.

    place  the file without its ending, which for responses without their instructions is another one
    of     hash of what is scored by what, which each score in the file has
    Raises DifferenceError for a file with other scores.
    Threads call the function of a row. Scores are on disk while they are made: a kill costs those under way. The first
    error of a row is raised once the scores under way are on disk.
    """
    failed = list[Exception]()
    file = Path(f"{place}-alone.jsonl" if isinstance(data, ResponsesAlone) else f"{place}.jsonl")

    def record(number: int) -> dict[str, Any] | None:
        try:
            if not failed:  # after the first error, waiting rows are passed over
                row = data[number]
                nll, correct = map(np.asarray, score(row))
                n_tokens = np.count_nonzero(row.target[1:])
                if not nll.shape == correct.shape == (n_tokens,):
                    raise ContractError(
                        f"a function of score_rows returned NLL {list(nll.shape)} and correct {list(correct.shape)} "
                        f"for {row.id}; allowed: one for each of its {n_tokens} response tokens"
                    )
                scores = {"nll": float(nll.sum()), "tokens": len(nll), "correct": int(correct.sum())}
                return {"id": row.id, "of": of, **scores, **({"token_nll": nll.tolist()} if token_nll else {})}
        except Exception as error:
            failed.append(error)
        return None

    with naming_damage(file):
        scored = {one["id"]: _checked(one, of, token_nll) for one in read_batches(file)}
    waiting = [number for number, name in enumerate(data.ids) if name not in scored]
    with (
        ThreadPool(threads) as pool,  # which waits for no thread when a signal ends this
        progress_bar("reference: scoring", total=len(data), done=len(scored), unit=" examples") as bar,
    ):
        for one in filter(None, pool.imap_unordered(record, waiting)):
            append_batch(file, [one])  # by this thread alone
            scored[one["id"]] = one
            bar.update()
    if failed:
        raise failed[0]
    # [N] each, in row order, whichever thread was first
    nll, tokens, correct = (np.array([scored[i][name] for i in data.ids]) for name in ("nll", "tokens", "correct"))
    each = {"token_nll": [np.array(scored[i]["token_nll"], dtype=np.float32) for i in data.ids]} if token_nll else {}
    return RowScores(nll, tokens, correct, each)


def _checked(one: dict[str, Any], of: str, token_nll: bool) -> dict[str, Any]:
    """Return a score of a file; raise an error for what is none, or is of others than `of`."""
    each = one["token_nll"] if token_nll else []
    if one["of"] != of:
        raise ValueError("it has scores by another server or model, or of other rows")
    numbers = all(type(nll) is float and 0 <= nll < math.inf for nll in (one["nll"], *each))
    counts = type(one["tokens"]) is type(one["correct"]) is int and 0 <= one["correct"] <= one["tokens"] < 2**31
    if not numbers or not counts or len(each) not in (0, one["tokens"]):
        raise ValueError(f"the score of {one['id']!r} is none")
    return one


def _kept(token_nll: bool, keep: Sequence[str]) -> list[str]:
    """Return what a scorer keeps of each row beside its sums."""
    return [*(["token_nll"] if token_nll else []), *keep]
