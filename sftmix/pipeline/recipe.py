"""The stages of a run: rows -> reference dynamics -> confidence -> split -> training -> Hugging Face model; then the
base model is measured, beside which the trained one is held.

Each stage reads what the one before it wrote, writes an artefact that a person can open, and is skipped when it is done
and its inputs are unchanged. A stage runs only when something needs it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sftmix.batches.order import TrainingOrder
from sftmix.batches.pairs import EpochPairs, fixed, unpaired
from sftmix.common.errors import ConfigError, DataError
from sftmix.common.files import read_json
from sftmix.common.tables import read_dynamics, read_split, write_confidence, write_dynamics, write_split
from sftmix.common.world import World, start_world
from sftmix.components.base import Objective, Perturbation, check_confidence, check_split, plain
from sftmix.components.confidence import variability
from sftmix.components.objectives import NTP
from sftmix.components.selection import All
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.config.text import resolve_text
from sftmix.data import encode, encoder_for, prepare, render_preview
from sftmix.measure.model import Measurement
from sftmix.measure.split import write_confounds
from sftmix.measure.summary import made_by, summarise
from sftmix.model.load import load_tokenizer
from sftmix.options import LoraOptions, reference_lora
from sftmix.pipeline.context import RunContext, any_packed, resolve_max_length, select_ids, selected_note
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.export import write_model
from sftmix.pipeline.reference import ReferenceRun, training_of_reference
from sftmix.pipeline.single_run import FromOnlineLosses
from sftmix.training.checkpoint import full_weights
from sftmix.training.dynamics import described
from sftmix.training.log import StopAtOnce
from sftmix.training.loop import Stage, StageResult, train
from sftmix.training.online import OnlineLosses
from sftmix.training.parallel import check_compiler
from sftmix.types import Scores, Split, TrainingDynamics

StageName = Literal["reference", "confidence", "split", "train"]

MAX_UNSCORED = 0.05
"""Largest share of examples that a reference may fail to score before the run stops with exit code 3."""


def run(
    config: RunConfig, *, until: StageName = "train", world: World | None = None, pool: Sequence[Path] = ()
) -> dict[str, Any]:
    """Do what is needed up to a stage, resuming what is there; returns the summary.

    world  the ranks, where they have met already; None: as torchrun announces them
    pool   other run directories; what they have finished from the same inputs is adopted, not made again
    Call it in every process of a torchrun. Raises the errors of `sftmix.common.errors`, which carry the exit codes.
    """
    validate(config)
    assert config.out is not None
    with (
        contextlib.nullcontext(world) if world else start_world() as ranks,
        RunDirectory(config.out, ranks, pool=pool) as directory,
        StopAtOnce(),
    ):
        if config.training.compile or training_of_reference(config)[0].compile:
            check_compiler(ranks.device)
        return Run(config, ranks, directory).until(until)


class Run(RunContext):
    """The stages that fill a run directory."""

    def until(self, stage: StageName) -> dict[str, Any]:
        if self.single_run and stage != "train":
            raise ConfigError(
                f"--reference {type(self.config.reference).__name__} takes the losses of the target's own training, so "
                f"there is no {stage} before it: use `run`, or another --reference"
            )
        self.say("\n".join(self.data.report.lines()))
        if stage == "reference":
            self.dynamics()
        elif stage == "confidence":
            _ = self.scores
        elif stage == "split":
            _ = self.split
        else:
            self.train("train", self.config.objective, self.config.perturbation)
            if self.single_run and self._epochs_begun > 1:
                _ = self.split  # the last epoch's, for people to look at
            elif self.single_run:
                self.say("train: stopped in the first epoch, before there was a split")
            if self.config.with_baseline:
                self.train("baseline", NTP(), None)
            self.base()
        summary = summarise(self)
        done = summary["stages"].get(stage, {})  # what was asked for, whatever came last
        step, total = (int(done.get(key, 0)) for key in ("steps", "total_steps"))
        self.directory.status(stage=stage, step=step, total_steps=total)
        return summary

    # -------------------------------------------------------------------------- reference, confidence

    def dynamics(self) -> TrainingDynamics:
        """Training dynamics of the reference, one row per example of the training set."""
        config = self.config
        path = self.directory.path / "confidence" / "dynamics.parquet"
        if self.single_run:  # what decided the last epoch
            last = self._online().dynamics(self._epochs_begun - 1)
            self.world.on_main(lambda: write_dynamics(path, last))
            return last
        inputs = {
            "data": self.data_identity(),
            "model": self.model_fingerprint,
            "reference": config.reference.spec(),
            "reference_files": self.contents(
                config.reference, *([config.optimizer] if config.reference.trains else [])
            ),
            "computed": self.computed(),
            **(self._training_of_reference() if config.reference.trains else {}),
        }
        if not self.begin("reference", inputs):
            started = time.time()
            context = ReferenceRun(self)
            dynamics = config.reference.collect(context).of(context.ids)
            self._refuse_if_unscored(dynamics)
            self.world.on_main(lambda: write_dynamics(path, dynamics))
            figures = {**context.figures, "wall_seconds": time.time() - started, "checkpoints": dynamics.steps.tolist()}
            self.finish("reference", ["../confidence/dynamics.parquet"], figures)
            self.say(f"reference: {described(dynamics)} ({figures['wall_seconds']:.0f} s)")
        return read_dynamics(path).of(self.data.train.ids)

    def _training_of_reference(self) -> dict[str, Any]:
        """What else decides a reference that is trained here."""
        model = getattr(self.config.reference, "model", None)
        training, seed = training_of_reference(self.config)
        return {
            "lora": lora_inputs(reference_lora(self.config.model, model)),
            "optimizer": self.config.optimizer.spec(),
            "training": self.training_identity(training),
            "callbacks": self.deciding_callbacks(),
            "seed": seed,
        }

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
            return self.table(data, None)
        dynamics = self.dynamics()
        path = self.directory.path / "confidence" / "confidence.parquet"
        dynamics_file = self.directory.path / "confidence" / "dynamics.parquet"
        inputs = {
            "dynamics": self.hash_of(dynamics_file),
            "confidence": self.config.confidence.spec(),
            "confidence_files": self.contents(self.config.confidence),
        }
        if not self.begin("confidence", inputs):
            started = time.time()
            self.world.on_main(lambda: self._write_confidence(path, dynamics))
            self.finish("confidence", ["confidence.parquet"], {"wall_seconds": time.time() - started})
        return self.table(data, path)

    def _write_confidence(self, path: Path, dynamics: TrainingDynamics) -> None:
        confidence = check_confidence(self.config.confidence.estimate(dynamics), dynamics)
        write_confidence(path, dynamics.ids, confidence, variability(dynamics))

    # ------------------------------------------------------------------------------------------ split

    @cached_property
    def split(self) -> Split:
        """The groups of the training examples."""
        scores = self.scores
        path = self.directory.path / "split" / "split.parquet"
        confidence_file = self.directory.path / "confidence" / "confidence.parquet"
        inputs = {
            "data": self.data_identity(),
            "confidence": self.hash_of(confidence_file) if self.config.splitter.needs_confidence else None,
            "splitter": self.config.splitter.spec(),
            "splitter_files": self.contents(self.config.splitter),
            "seed": self.config.seed,
        }
        if not self.begin("split", inputs):
            started = time.time()
            divide = self.config.splitter.split
            self.world.on_main(
                lambda: write_split(path, scores.id, check_split(divide(scores, seed=self.config.seed), scores))
            )
            made = read_split(path)[1]
            files = self.world.on_main(lambda: write_confounds(self.directory.path, scores, made, self.data.train))
            figures = {"wall_seconds": time.time() - started}
            self.finish("split", ["split.parquet", *(files or [])], figures)
            self.say(f"split: {', '.join(f'{name} {len(made.rows(g)):,}' for g, name in enumerate(made.names))}")
        return read_split(path)[1]

    # --------------------------------------------------------------------------------------- training

    def train(self, name: str, objective: Objective, perturbation: Perturbation | None) -> None:
        """Train the target (or the NTP baseline, plain and in the same order) and export it."""
        config, data = self.config, self.data
        split = None if self.pairing is None or self.single_run else self.split
        inputs = {
            "data": self.data_identity(),
            "eval": data.eval.fingerprint if data.eval else None,
            "model": self.model_fingerprint,
            "dtype": config.model.dtype,
            "lora": lora_inputs(config.model.lora),
            "split": self.hash_of(self.directory.path / "split" / "split.parquet") if split else None,
            "confidence": self._confidence_of_pairs() if split else None,
            "pairing": plain(self.pairing),
            "objective": objective.spec(),
            "optimizer": config.optimizer.spec(),
            "perturbation": plain(perturbation),
            "files": self.contents(self.pairing, objective, config.optimizer, perturbation, *self.deciding()),
            "computed": self.computed(),
            "training": self.training_identity(config.training),
            "callbacks": self.deciding_callbacks(),
            "seed": config.seed,
        }
        if self.single_run:
            chosen = (config.reference, config.confidence, config.splitter)
            inputs["online"] = [{**component.spec(), "files": self.contents(component)} for component in chosen]
        if self.begin(name, inputs):
            return
        started = time.time()
        directory = self.directory.path / name

        pairs = self._epoch_pairs if name == "train" else self._pairs_of_baseline
        stage = self.stage(
            name,
            model_path=config.model.path,
            lora=config.model.lora,
            encoder=self.encoder,
            data=data.train,
            eval_data=data.eval,
            objective=objective,
            perturbation=perturbation,
            options=config.training,
            order=self._order_of_training(pairs),
            split_of=pairs.split_of,
            online=self._online().losses if self.single_run and name == "train" else None,
            seed=config.seed,
            callbacks=config.callbacks,
        )
        result = train(stage, self.world)
        measurement = Measurement(directory, self.world, data)
        measured = measurement.trained(stage, result.module, steps=int(result.figures["steps"]))
        self._export(stage, result, directory / "model")
        figures = {**result.figures, **measured.figures, "wall_seconds": time.time() - started}
        figures["made_by"] = made_by(self.world.size)
        online = ["online"] if (directory / "online").exists() else []
        self.finish(name, ["model", "metrics.jsonl", *measured.files, *online], figures)
        held_out = f", held-out NLL {figures['eval_nll']:.4f} per token" if "eval_nll" in figures else ""
        self.say(f"{name}: {figures['steps']} steps{held_out} ({figures['wall_seconds']:.0f} s)")

    def base(self) -> None:
        """Measure the untrained model, once for all arms, after them: it holds up no first step (decision 10)."""
        config, data = self.config, self.data
        lora = config.model.lora.without_adapters()
        inputs = {
            "data": self.data_identity(),
            "eval": data.eval.fingerprint if data.eval else None,
            "model": self.model_fingerprint,
            "quantize": lora.quantize,
            "computed": self.computed(),
        }
        if self.begin("base", inputs):
            return
        started = time.time()
        packed = any_packed(data.train, data.eval)
        score = self.scoring("base", config.model.path, encoder=self.encoder, packed=packed, lora=lora)
        measured = Measurement(self.directory.path / "base", self.world, data).base(score)
        figures = {**measured.figures, "wall_seconds": time.time() - started}
        self.finish("base", measured.files, figures)
        held_out = f"held-out NLL {figures['eval_nll']:.4f} per token" if "eval_nll" in figures else "a sample scored"
        self.say(f"base: {held_out} ({figures['wall_seconds']:.0f} s)")

    def _confidence_of_pairs(self) -> str | None:
        """Pair samplers see the confidence as well as the groups."""
        known = self.config.splitter.needs_confidence
        return self.hash_of(self.directory.path / "confidence" / "confidence.parquet") if known else None

    @property
    def single_run(self) -> bool:
        """The target's own losses are its confidence: the stages before training are made while it trains."""
        uses_confidence = self.pairing is not None and self.config.splitter.needs_confidence
        return uses_confidence and self.config.reference.single_run

    @cached_property
    def _epoch_pairs(self) -> EpochPairs:
        if self.pairing is None:
            return unpaired()
        return (
            self._online().pairs()
            if self.single_run
            else fixed(self.split, self.scores, self.pairing, self.config.seed)
        )

    @property
    def _pairs_of_baseline(self) -> EpochPairs:
        """The target's. A callback may stop a single run in an epoch that the baseline trains beyond."""
        return self._online().pairs(begun=self._epochs_begun) if self.single_run else self._epoch_pairs

    @cached_property
    def _epochs_begun(self) -> int:
        """Epochs that the target took a step in, once it is trained; at least 1."""
        steps = int(read_json(self.directory.path / "train" / "figures.json")["steps"])
        return self._order_of_training(self._epoch_pairs).epoch_of(steps - 1) + 1

    def _online(self) -> FromOnlineLosses:
        config, data = self.config, self.data.train
        assert self.pairing is not None
        return FromOnlineLosses(
            losses=OnlineLosses(data.ids, self.directory.path / "train" / "online", self.world),
            window=getattr(config.reference, "window", 1),
            estimator=config.confidence,
            splitter=config.splitter,
            pairing=self.pairing,
            table=self.table(data, None),
            seed=config.seed,
        )

    def _order_of_training(self, pairs: EpochPairs) -> TrainingOrder:
        options = self.config.training
        order = TrainingOrder(
            len(self.data.train), pairs.pairs_of, options=options, seed=self.config.seed, known=pairs.known
        )
        if self.single_run and len(order.ends) < 2:
            raise ConfigError(
                f"--reference {type(self.config.reference).__name__} needs a second epoch, which the losses of the "
                f"first decide, but training has {len(order.ends)}: raise training.epochs (or training.max_steps)"
            )
        return order

    def _export(self, stage: Stage, result: StageResult, path: Path) -> None:
        weights = full_weights(result.module)
        if self.world.is_main:
            base, dtype = self.config.model.path, self.config.model.dtype
            write_model(stage.model, weights, path, base=base, dtype=dtype, encoder=self.encoder)
        self.world.barrier()


def lora_inputs(lora: LoraOptions) -> dict[str, Any] | None:
    """The adapters among the inputs of a stage; None where all weights are trained."""
    return plain(lora) if lora.r else None


def preview(config: RunConfig, rows: int, *, color: bool = True) -> str:
    """The first rows as the model will see them, of those selected, and what will be dropped; nothing is written."""
    validate(config, needs_out=False)
    prepared = prepare(config.data, config.seed)
    config = resolve_text(config, prepared)
    encoder = encoder_for(load_tokenizer(config.model.path), config.data)
    length = resolve_max_length(config.data.max_length, config.model.path, key="data.max_length")
    data = encode(prepared, encoder, max_length=length)
    if not isinstance(config.selector, All):
        whole = data.train
        data = encode(prepared, encoder, max_length=length, keep=select_ids(config, whole))
        data.report.notes.append(selected_note(config, data.train, whole))
    return render_preview(data, encoder, range(min(rows, len(data.train))), color=color)
