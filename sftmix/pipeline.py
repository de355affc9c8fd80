"""The stages of a run: rows -> reference dynamics -> confidence -> split -> training -> Hugging Face model.

Each stage reads what the one before it wrote, writes an artefact that a person can open, and is skipped when it is done
and its inputs are unchanged. A stage runs only when something needs it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sftmix.artefacts import sha256_file, write_text
from sftmix.attention import check_packing
from sftmix.components.base import Component, Objective, check_confidence, check_pairs, check_split, plain
from sftmix.components.confidence import variability
from sftmix.components.objectives import NTP
from sftmix.config import RunConfig
from sftmix.config.text import resolve_text
from sftmix.data import EncodedDataset, Encoder, LoadedData, Prepared, encode, encoder_for, prepare, render_preview
from sftmix.dynamics import described, score_rows
from sftmix.errors import ConfigError, DataError
from sftmix.export import write_model
from sftmix.model_files import context_length, fingerprint
from sftmix.models import check_head, check_vocabulary, load_model, load_tokenizer
from sftmix.options import TrainingOptions
from sftmix.reference_run import ReferenceRun
from sftmix.rundir import RunDirectory
from sftmix.store import read_confidence, read_dynamics, read_split, write_confidence, write_dynamics, write_split
from sftmix.summary import summarise
from sftmix.training.callbacks import BeforeAndAfter
from sftmix.training.checkpoint import full_weights
from sftmix.training.distributed import World, resolve_precision, start_world
from sftmix.training.loop import Stage, StageResult, train
from sftmix.training.order import TrainingOrder
from sftmix.types import Rows, Scores, Split, TrainingDynamics

StageName = Literal["reference", "confidence", "split", "train"]

MAX_UNSCORED = 0.05
"""Largest share of examples that a reference may fail to score before the run stops with exit code 3."""

LAYOUT_OPTIONS = ("micro_batch_size", "parallel", "activation_checkpointing", "length_groups", "chunk_size")
"""Training options that say how a step is computed, not what; a resumed run may change them."""


def run(config: RunConfig, *, until: StageName = "train") -> dict[str, Any]:
    """Do what is needed up to a stage, resuming what is there; returns the summary.

    Call it in every process of a torchrun. Raises the errors of `sftmix.errors`, which carry the exit codes.
    """
    config.validate()
    assert config.out is not None
    with start_world() as world, RunDirectory(config.out, world) as directory:
        return Run(config, world, directory).until(until)


class Run:
    """One run directory and the stages that fill it."""

    def __init__(self, config: RunConfig, world: World, directory: RunDirectory) -> None:
        self.config, self.world, self.directory = config, world, directory
        directory.status(stage="data")
        self.prepared: Prepared = world.main_first(
            lambda: prepare(config.data, config.seed, progress=world.is_main),
        )
        self.config = config = resolve_text(config, self.prepared)
        self.pairing = config.resolved_pairing()

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def until(self, stage: StageName) -> dict[str, Any]:
        self.say("\n".join(self.data.report.lines()))
        if stage == "reference":
            self.dynamics()
        elif stage == "confidence":
            _ = self.scores
        elif stage == "split":
            _ = self.split
        else:
            self.train("train", self.config.objective)
            if self.config.with_baseline:
                self.train("baseline", NTP())
        return summarise(self)

    # ------------------------------------------------------------------------------------------- data

    @cached_property
    def encoder(self) -> Encoder:
        return encoder_for(load_tokenizer(self.config.model.path), self.config.data)

    @cached_property
    def data(self) -> LoadedData:
        limit = self.config.data.max_length
        return self.encode(self.encoder, self.config.model.path, limit, key="data.max_length")

    def encode(
        self, encoder: Encoder, model_path: str, max_length: int | None, *, key: str, keep: Sequence[str] | None = None
    ) -> LoadedData:
        """The rows of this run (or those with the ids `keep`) under an encoder.

        max_length  tokens of each at most; None: as the model allows
        """
        length = resolve_max_length(max_length, model_path, key=key)
        return self.world.main_first(
            lambda: encode(
                self.prepared, encoder, max_length=length, keep=keep, length_option=key, progress=self.world.is_main
            )
        )

    @cached_property
    def model_fingerprint(self) -> str:
        return self.world.share(fingerprint(self.config.model.path) if self.world.is_main else None)

    # -------------------------------------------------------------------------- reference, confidence

    def dynamics(self) -> TrainingDynamics:
        """Training dynamics of the reference, one row per example of the training set."""
        config = self.config
        inputs = {
            "data": self._data(),
            "model": self.model_fingerprint,
            "reference": config.reference.spec(),
            "reference_files": self._contents(config.reference),
            "training": self._what(),
            "callbacks": self._deciding_callbacks(),
            "seed": config.seed,
        }
        path = self.directory.path / "confidence" / "dynamics.parquet"
        if not self._begin("reference", inputs):
            started = time.time()
            context = ReferenceRun(self)
            dynamics = config.reference.collect(context).of(context.ids)
            self._refuse_if_unscored(dynamics)
            self.world.on_main(lambda: write_dynamics(path, dynamics))
            figures = {**context.figures, "wall_seconds": time.time() - started, "checkpoints": dynamics.steps.tolist()}
            self.directory.finish("reference", ["../confidence/dynamics.parquet"], figures)
            self.say(f"reference: {described(dynamics)} ({figures['wall_seconds']:.0f} s)")
        return read_dynamics(path).of(self.data.train.ids)

    def _refuse_if_unscored(self, dynamics: TrainingDynamics) -> None:
        missing = [i for i, ok in zip(dynamics.ids, dynamics.scored, strict=True) if not ok]
        if len(missing) > MAX_UNSCORED * len(dynamics.ids):
            raise DataError(
                f"the reference could not score {len(missing)} of {len(dynamics.ids)} examples (first: {missing[:5]}): "
                "raise reference.model.max_length if no response token is left, or give a file that holds them"
            )
        if missing:
            self.say(f"confidence: {len(missing)} examples the reference could not score stay unpaired: {missing[:5]}")

    @cached_property
    def scores(self) -> Scores:
        """The table that splitters and samplers see; without confidence where the split needs none."""
        data = self.data.train
        if not self.config.splitter.needs_confidence:
            return self._table(data, None)
        dynamics = self.dynamics()
        path = self.directory.path / "confidence" / "confidence.parquet"
        dynamics_file = self.directory.path / "confidence" / "dynamics.parquet"
        inputs = {"dynamics": self._hash(dynamics_file), "confidence": self.config.confidence.spec()}
        if not self._begin("confidence", inputs):
            started = time.time()
            self.world.on_main(lambda: self._write_confidence(path, dynamics))
            self.directory.finish("confidence", ["confidence.parquet"], {"wall_seconds": time.time() - started})
        return self._table(data, path)

    def _write_confidence(self, path: Path, dynamics: TrainingDynamics) -> None:
        confidence = check_confidence(self.config.confidence.estimate(dynamics), dynamics)
        write_confidence(path, dynamics.ids, confidence, variability(dynamics))

    def _table(self, data: EncodedDataset, path: Path | None) -> Scores:
        nothing = np.full(len(data), np.nan)
        confidence, spread = (nothing, nothing) if path is None else read_confidence(path)[1:]
        return Scores(
            id=data.ids,
            row=np.arange(len(data), dtype=np.int64),
            confidence=confidence,
            variability=spread,
            n_tokens=data.n_targets,
            label=data.labels,
            columns=data.columns,
        )

    # ------------------------------------------------------------------------------------------ split

    @cached_property
    def split(self) -> Split:
        """The groups of the training examples."""
        scores = self.scores
        path = self.directory.path / "split" / "split.parquet"
        confidence_file = self.directory.path / "confidence" / "confidence.parquet"
        inputs = {
            "data": self._data(),
            "confidence": self._hash(confidence_file) if self.config.splitter.needs_confidence else None,
            "splitter": self.config.splitter.spec(),
            "splitter_files": self._contents(self.config.splitter),
            "seed": self.config.seed,
        }
        if not self._begin("split", inputs):
            started = time.time()
            divide = self.config.splitter.split
            self.world.on_main(
                lambda: write_split(path, scores.id, check_split(divide(scores, seed=self.config.seed), scores))
            )
            self.directory.finish("split", ["split.parquet"], {"wall_seconds": time.time() - started})
            made = read_split(path)[1]
            self.say(f"split: {', '.join(f'{name} {len(made.rows(g)):,}' for g, name in enumerate(made.names))}")
        return read_split(path)[1]

    # --------------------------------------------------------------------------------------- training

    def train(self, name: str, objective: Objective) -> None:
        """Train the target (or the NTP baseline, in the same order) and export it."""
        config, data = self.config, self.data
        split = None if self.pairing is None else self.split
        inputs = {
            "data": self._data(),
            "eval": data.eval.fingerprint if data.eval else None,
            "model": self.model_fingerprint,
            "dtype": config.model.dtype,
            "split": self._hash(self.directory.path / "split" / "split.parquet") if split else None,
            "pairing": plain(self.pairing),
            "objective": objective.spec(),
            "training": self._what(),
            "callbacks": self._deciding_callbacks(),
            "seed": config.seed,
        }
        if self._begin(name, inputs):
            return
        started = time.time()
        directory = self.directory.path / name

        def pairs_of(epoch: int) -> Rows | None:
            if self.pairing is None or split is None:
                return None
            return check_pairs(self.pairing.pairs(split, self.scores, epoch=epoch, seed=config.seed), len(data.train))

        stage = self.stage(
            name,
            model_path=config.model.path,
            encoder=self.encoder,
            data=data.train,
            eval_data=data.eval,
            objective=objective,
            options=config.training,
            pairs_of=pairs_of,
            seed=config.seed,
            split=split,
            callbacks=[BeforeAndAfter(directory / "eval_before.json", self.world), *config.callbacks],
        )
        result = train(stage, self.world)
        self._export(stage, result, directory / "model")
        figures = {**result.figures, "wall_seconds": time.time() - started}
        self.directory.finish(name, ["model", "metrics.jsonl"], figures)
        held_out = f", held-out NLL {figures['eval_nll']:.4f} per token" if "eval_nll" in figures else ""
        self.say(f"{name}: {figures['steps']} steps{held_out} ({figures['wall_seconds']:.0f} s)")

    def stage(self, name: str, *, model_path: str, encoder: Encoder, options: TrainingOptions, **rest: Any) -> Stage:
        """A stage of this run, with its model loaded and checked."""
        gc.collect()  # the weights of the stage before, which modules keep alive in cycles
        model = load_model(model_path, attention=self.config.model.attention)
        check_head(model)
        check_vocabulary(model, encoder.tokenizer)
        if any(rows is not None and rows.packed for rows in (rest["data"], rest.get("eval_data"))):
            check_packing(model)
        pairs_of, seed = rest.pop("pairs_of"), rest["seed"]
        precision = resolve_precision(options.precision, self.world.device)
        scorer = partial(score_rows, world=self.world, precision=precision, progress=f"{name}: scoring")
        return Stage(
            name=name,
            model=model,
            order=TrainingOrder(len(rest["data"]), pairs_of, options=options, seed=seed),
            options=options,
            checkpoint=self.config.checkpoint,
            directory=self.directory.path / name,
            identity=self.directory.identity(name),
            pad_id=encoder.pad_id,
            scorer=partial(scorer, pad_id=encoder.pad_id, token_nll=rest.pop("token_nll", False)),
            on_progress=lambda step, total: self.directory.status(step=step, total_steps=total, throttle=1.0),
            **rest,
        )

    def _export(self, stage: Stage, result: StageResult, path: Path) -> None:
        weights = full_weights(result.module)
        if self.world.is_main:
            base, dtype = self.config.model.path, self.config.model.dtype
            write_model(stage.model, weights, path, base=base, dtype=dtype, encoder=self.encoder)
        self.world.barrier()

    # ---------------------------------------------------------------------------------------- details

    def _begin(self, stage: str, inputs: dict[str, Any]) -> bool:
        """Enter a stage; True if it is done. config.yaml follows what was accepted, never what was refused."""
        done = self.directory.begin(stage, inputs)
        if not done and self.world.is_main:
            write_text(self.directory.path / "config.yaml", self.config.yaml())
        return done

    def _hash(self, path: Path) -> str:
        return self.world.share(sha256_file(path) if self.world.is_main else None)

    def _contents(self, component: Component) -> dict[str, str | None]:
        """Fingerprints of what a component depends on; None for a mistake, which its reader will explain."""

        def known(name: str) -> str | None:
            try:
                return fingerprint(name)
            except ConfigError:
                return None

        names = component.files()  # on every rank: what it raises is everybody's error
        return self.world.share({name: known(name) for name in names} if self.world.is_main else None)

    def _data(self) -> dict[str, Any]:
        """Identity of the training rows, and the options that people change, so that a refusal can name them."""
        data = self.config.data
        return {
            **{k: getattr(data, k) for k in ("limit", "eval_fraction", "multi_turn", "format", "packing")},
            "max_length": self.data.report.max_length,
            "template": self.encoder.name,
            "fingerprint": self.data.train.fingerprint,
        }

    def _deciding_callbacks(self) -> list[dict[str, Any]]:
        return [c.spec() for c in self.config.callbacks if not c.observer]

    def _what(self) -> dict[str, Any]:
        """The training options that decide the result."""
        options = self.config.training
        values = {**plain(options), "precision": resolve_precision(options.precision, self.world.device)}
        return {k: v for k, v in values.items() if k not in LAYOUT_OPTIONS}


def preview(config: RunConfig, rows: int, *, color: bool = True) -> str:
    """The first rows as the model will see them, and those that will be dropped; nothing is written."""
    config.validate(needs_out=False)
    prepared = prepare(config.data, config.seed)
    config = resolve_text(config, prepared)
    encoder = encoder_for(load_tokenizer(config.model.path), config.data)
    length = resolve_max_length(config.data.max_length, config.model.path, key="data.max_length")
    data = encode(prepared, encoder, max_length=length)
    return render_preview(data, encoder, range(min(rows, len(data.train))), color=color)


def resolve_max_length(requested: int | None, model_path: str, *, key: str) -> int:
    """Tokens per example: as asked, or the smaller of 2,048 and the model's context."""
    context = context_length(model_path)
    if requested is not None and context is not None and requested > context:
        raise ConfigError(f"{key} is {requested}, but {model_path} has a context of {context} tokens")
    return requested or min(2048, context or 2048)
