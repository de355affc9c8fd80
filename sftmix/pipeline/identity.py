"""The inputs of a stage as values and hashes: a stage is read back only if all of them are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.common.files import sha256_file
from sftmix.common.world import World
from sftmix.components.base import Callback, Component, files_of, plain
from sftmix.config import RunConfig
from sftmix.model.load import fingerprint
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.pipeline.rows import RunRows
from sftmix.training.parallel import resolve_precision

LAYOUT_OPTIONS: tuple[str, ...] = ("micro_batch_size", "micro_batch_tokens", "length_groups", "padding_free")
LAYOUT_OPTIONS += ("parallel", "shard_group_size", "activation_checkpointing", "compile", "chunk_size")
"""Training options that say how a step is computed, not what; a resumed run may change them."""


def file_hash(path: Path, world: World) -> str:
    """Return the SHA-256 of a file of the run, on all ranks."""
    return world.share(sha256_file(path) if world.is_main else None)


def model_identity(path: str, world: World) -> str:
    """Return the fingerprint of a model's files, or the commit of a hub model."""
    return world.share(fingerprint(path) if world.is_main else None)


def files_identity(world: World, *components: Component | None) -> dict[str, str | None]:
    """Return fingerprints of the files of components; None for an unreadable file, which its reader will explain."""

    def known(name: str) -> str | None:
        try:
            return fingerprint(name)
        except ConfigError:
            return None

    # On every rank: what it raises is everybody's error.
    names = [name for component in components if component is not None for name in files_of(component)]
    return world.share({name: known(name) for name in names} if world.is_main else None)


def data_identity(config: RunConfig, rows: RunRows) -> dict[str, Any]:
    """Return the identity of the training rows, and the options behind it, so that a refusal can name them."""
    data = config.data
    return {
        **{k: getattr(data, k) for k in ("limit", "eval_fraction", "multi_turn", "format", "packing", "labels")},
        "max_length": rows.data.report.max_length,
        "template": rows.encoder.name,
        "fingerprint": rows.data.train.fingerprint,
    }


def computation_identity(config: RunConfig, world: World) -> dict[str, Any]:
    """Return the options of a model's computation that decide numbers."""
    precision = resolve_precision(config.training.precision, world.device)
    return {"precision": precision, "attention": config.model.attention}


def training_identity(options: TrainingOptions, world: World) -> dict[str, Any]:
    """Return the training options that decide the result."""
    values = {**plain(options), "precision": resolve_precision(options.precision, world.device)}
    return {k: v for k, v in values.items() if k not in LAYOUT_OPTIONS}


def lora_identity(lora: LoraOptions) -> dict[str, Any] | None:
    """Return the options of the adapters; None if all weights are trained."""
    return plain(lora) if lora.r else None


def deciding_callbacks(config: RunConfig) -> list[Callback]:
    """List the callbacks that may change the course of a training."""
    return [callback for callback in config.callbacks if not callback.observer]
