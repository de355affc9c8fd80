"""What every stage of a run shares: its rows, models, fingerprints, and the directory that it writes to."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sftmix.batches.rows import TokenisedRows
from sftmix.common.errors import ConfigError
from sftmix.common.files import sha256_file, write_text
from sftmix.common.rng import stable_hash
from sftmix.common.tables import read_confidence, read_ids, write_ids
from sftmix.common.world import World
from sftmix.components.base import Callback, Component, check_selection, files_of, plain
from sftmix.components.selection import All
from sftmix.config import RunConfig
from sftmix.config.checks import quantized_shards, sharded_optimizer
from sftmix.config.text import resolve_text
from sftmix.data import EncodedDataset, Encoder, LoadedData, Prepared, encode, encoder_for, prepare
from sftmix.model.adapters import add_adapters, described_adapters, quantization_config
from sftmix.model.head import check_head
from sftmix.model.load import check_vocabulary, context_length, fingerprint, load_model, load_tokenizer
from sftmix.model.meta import Values, empty_model, mapped_model, take_values
from sftmix.options import SHARDED, LoraOptions, TrainingOptions
from sftmix.pipeline.directory import RunDirectory
from sftmix.training.log import PeakMemory
from sftmix.training.loop import Stage
from sftmix.training.parallel import resolve_parallel, resolve_precision, training_module
from sftmix.training.scoring import Scorer
from sftmix.types import RowScores, Scores

LAYOUT_OPTIONS: tuple[str, ...] = ("micro_batch_size", "micro_batch_tokens", "length_groups", "padding_free")

LAYOUT_OPTIONS += ("parallel", "shard_group_size", "activation_checkpointing", "compile", "chunk_size")
"""Training options that say how a step is computed, not what; a resumed run may change them."""


class RunContext:
    """One run directory, and what its stages are made with."""

    def __init__(self, config: RunConfig, world: World, directory: RunDirectory) -> None:
        self.config, self.world, self.directory = config, world, directory
        directory.status(stage="data")
        self.prepared: Prepared = world.main_first(
            lambda: prepare(config.data, config.seed, progress=world.is_main),
        )
        self.config = config = resolve_text(config, self.prepared)
        self.pairing = config.resolved_pairing()
        self.memory = PeakMemory(world.device)
        """Of the stage that was begun last."""

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    # ------------------------------------------------------------------------------------------- data

    @cached_property
    def encoder(self) -> Encoder:
        return encoder_for(load_tokenizer(self.config.model.path), self.config.data)

    @cached_property
    def data(self) -> LoadedData:
        config = self.config

        def encode(keep: Sequence[str] | None = None) -> LoadedData:
            limit = config.data.max_length
            return self.encode(self.encoder, config.model.path, limit, key="data.max_length", keep=keep)

        whole = encode()
        kept = None if isinstance(config.selector, All) else self._selected(whole.train)
        if kept is None:
            return whole
        data = encode(kept)
        data.report.notes.append(selected_note(config, data.train, whole.train))
        return data

    def _selected(self, rows: EncodedDataset) -> list[str]:
        """The ids that the selector keeps, in file order."""
        selector, path = self.config.selector, self.directory.path / "selection" / "selected.parquet"
        inputs = {
            "data": rows.fingerprint,
            "selector": selector.spec(),
            "selector_files": self.contents(selector),
            "seed": self.config.seed,
        }
        if not self.begin("selection", inputs):
            self.world.on_main(lambda: write_ids(path, select_ids(self.config, rows)))
            self.finish("selection", ["selected.parquet"], {})
        return read_ids(path)

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

    @staticmethod
    def table(data: EncodedDataset, path: Path | None) -> Scores:
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

    # ------------------------------------------------------------------------------------------ models

    def model(
        self,
        path: str,
        encoder: Encoder,
        options: TrainingOptions,
        lora: LoraOptions | None = None,
        *,
        seed: int = 0,
    ) -> tuple[PreTrainedModel, Values | None]:
        """A model whose head and vocabulary fit the loss and the encoder, with the adapters that are trained.

        Where ranks share the weights, the model is on the meta device, and its values, with the check that waits for
        them, are the second.
        """
        gc.collect()  # the weights of the stage before, which modules keep alive in cycles
        lora = lora or LoraOptions()
        sharded = resolve_parallel(options.parallel, self.world) in SHARDED
        if lora.quantize and sharded:
            raise ConfigError(quantized_shards(lora, f"training.parallel {options.parallel} (here fsdp)"))
        if sharded:
            return self._model_of_shards(path, encoder, lora, seed)
        precision = resolve_precision(options.precision, self.world.device)
        quantization = quantization_config(lora, compute=torch.bfloat16 if precision == "bf16" else torch.float32)
        model = load_model(path, attention=self.config.model.attention, quantization=quantization)
        if lora.r:
            add_adapters(model, lora, seed=_adapter_seed(seed))
        check_head(model)
        check_vocabulary(model, encoder.tokenizer)
        return model, None

    def _model_of_shards(
        self, path: str, encoder: Encoder, lora: LoraOptions, seed: int
    ) -> tuple[PreTrainedModel, Values]:
        """Every rank maps the files, or rank 0 loads the model and sends what the others have only the form of."""
        attention = self.config.model.attention
        if not lora.r and (model := mapped_model(path, attention=attention)) is not None:
            check_vocabulary(model, encoder.tokenizer)
            return model, Values(model, take_values(model), self.world, from_main=False, checks=[check_head])

        def whole() -> PreTrainedModel:
            model = load_model(path, attention=attention)
            if lora.r:
                add_adapters(model, lora, seed=_adapter_seed(seed))  # some are made of the model's values
            return model

        loaded = self.world.on_main(whole)
        model = loaded or empty_model(path, attention=attention)
        if lora.r and loaded is None:
            add_adapters(model, replace(lora, init_lora_weights=True), seed=0)
        check_vocabulary(model, encoder.tokenizer)
        values = take_values(model)
        return model, Values(model, values if loaded else {}, self.world, from_main=True, checks=[check_head])

    def scorer(self, options: TrainingOptions, encoder: Encoder, *, name: str, token_nll: bool = False) -> Scorer:
        return Scorer(
            world=self.world,
            precision=resolve_precision(options.precision, self.world.device),
            pad_id=encoder.pad_id,
            token_nll=token_nll,
            progress=f"{name}: scoring",
        )

    def scoring(
        self,
        name: str,
        path: str,
        *,
        encoder: Encoder,
        packed: bool,
        lora: LoraOptions | None = None,
        token_nll: bool = False,
    ) -> Callable[[TokenisedRows], RowScores]:
        """What scores rows under a model as it is, for the stage of that name.

        packed  some of the rows hold several documents
        lora    says whether the model is stored in 4 bits, as one that adapters are trained on
        """
        options = self.config.training
        precision = resolve_precision(options.precision, self.world.device)
        model, values = self.model(path, encoder, options, lora)
        module = training_module(model, options, precision=precision, world=self.world, packed=packed, values=values)
        return partial(self.scorer(options, encoder, name=name, token_nll=token_nll), module)

    def stage(
        self,
        name: str,
        *,
        model_path: str,
        encoder: Encoder,
        options: TrainingOptions,
        lora: LoraOptions,
        token_nll: bool = False,
        **rest: Any,
    ) -> Stage:
        """A stage of this run, with its model loaded and checked."""
        optimizer, parallel = self.config.optimizer, resolve_parallel(options.parallel, self.world)
        if parallel in SHARDED and not optimizer.shards:
            raise ConfigError(sharded_optimizer(optimizer, f"training.parallel {options.parallel} (here {parallel})"))
        model, values = self.model(model_path, encoder, options, lora, seed=rest["seed"])
        if lora.r:
            self.say(f"{name}: {described_adapters(model)}")
        return Stage(
            name=name,
            model=model,
            values=values,
            optimizer=optimizer,
            memory=self.memory,
            options=options,
            checkpoint=self.config.checkpoint,
            directory=self.directory.path / name,
            identity=self.directory.identity(name),
            pad_id=encoder.pad_id,
            packed=any_packed(rest["data"], rest.get("eval_data")),
            scorer=self.scorer(options, encoder, name=name, token_nll=token_nll),
            on_progress=lambda step, total: self.directory.status(step=step, total_steps=total, throttle=1.0),
            **rest,
        )

    # ---------------------------------------------------------------------------------------- details

    def begin(self, stage: str, inputs: dict[str, Any]) -> bool:
        """Enter a stage; True if it is done. config.yaml follows what was accepted, never what was refused."""
        done = self.directory.begin(stage, inputs)
        self.memory = PeakMemory(self.world.device)
        file = self.directory.path / "config.yaml"
        if self.world.is_main and not (done and file.exists()):
            write_text(file, self.config.yaml())
        return done

    def finish(self, stage: str, outputs: list[str], figures: Mapping[str, Any]) -> None:
        """Leave a stage, with its files and figures, and the most memory that a rank held in it."""
        peak = self.world.max(self.memory.bytes())
        self.directory.finish(stage, outputs, {**figures, "peak_memory_bytes": peak})

    def hash_of(self, path: Path) -> str:
        return self.world.share(sha256_file(path) if self.world.is_main else None)

    def contents(self, *components: Component | None) -> dict[str, str | None]:
        """Fingerprints of what components depend on; None for a mistake, which its reader will explain."""

        def known(name: str) -> str | None:
            try:
                return fingerprint(name)
            except ConfigError:
                return None

        # On every rank: what it raises is everybody's error.
        names = [name for component in components if component is not None for name in files_of(component)]
        return self.world.share({name: known(name) for name in names} if self.world.is_main else None)

    def computed(self) -> dict[str, Any]:
        """How a model is computed, as far as it decides numbers."""
        precision = resolve_precision(self.config.training.precision, self.world.device)
        return {"precision": precision, "attention": self.config.model.attention}

    def data_identity(self) -> dict[str, Any]:
        """Identity of the training rows, and the options that people change, so that a refusal can name them."""
        data = self.config.data
        return {
            **{k: getattr(data, k) for k in ("limit", "eval_fraction", "multi_turn", "format", "packing", "labels")},
            "max_length": self.data.report.max_length,
            "template": self.encoder.name,
            "fingerprint": self.data.train.fingerprint,
        }

    def deciding(self) -> list[Callback]:
        """The callbacks that may change the course of a training."""
        return [c for c in self.config.callbacks if not c.observer]

    def deciding_callbacks(self) -> list[dict[str, Any]]:
        return [c.spec() for c in self.deciding()]

    def training_identity(self, options: TrainingOptions) -> dict[str, Any]:
        """The training options that decide the result."""
        values = {**plain(options), "precision": resolve_precision(options.precision, self.world.device)}
        return {k: v for k, v in values.items() if k not in LAYOUT_OPTIONS}


def any_packed(*data: EncodedDataset | None) -> bool:
    """Whether rows of some of these hold several documents."""
    return any(rows is not None and rows.packed for rows in data)


def _adapter_seed(seed: int) -> int:
    return stable_hash(seed, "adapters") % 2**63


def resolve_max_length(requested: int | None, model_path: str, *, key: str) -> int:
    """Tokens per example: as asked, or the smaller of 2,048 and the model's context."""
    context = context_length(model_path)
    if requested is not None and context is not None and requested > context:
        raise ConfigError(f"{key} is {requested}, but {model_path} has a context of {context} tokens")
    return requested or min(2048, context or 2048)


def select_ids(config: RunConfig, rows: EncodedDataset) -> list[str]:
    """The ids that the selector keeps, in file order."""
    chosen = config.selector.select(RunContext.table(rows, None), seed=config.seed)
    return [rows.ids[row] for row in check_selection(chosen, len(rows))]


def selected_note(config: RunConfig, kept: EncodedDataset, whole: EncodedDataset) -> str:
    """What the report says of the selector."""
    return f"{len(kept):,} of {len(whole):,} examples selected by {type(config.selector).__name__}"
