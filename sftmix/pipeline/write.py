"""The model of a run as a Hugging Face directory: of the training's end, of a checkpoint, or of adapters, merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sftmix.common.errors import CheckpointError
from sftmix.common.world import World
from sftmix.config import RunConfig
from sftmix.data import Encoder, encoder_for
from sftmix.model.adapters import adapter_config, add_adapters, merge_adapters, read_adapters
from sftmix.model.export import export_model
from sftmix.model.load import load_model, load_tokenizer, stored_dtype
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.module import TrainingModule


def write_checkpoint(config: RunConfig, kept: Path, to: Path, *, step: int | None, dtype: str, merge: bool) -> Path:
    """Write a checkpoint of the directory `kept`, the newest one without a step.

    dtype, merge  as for `sftmix.pipeline.export.export_run`
    """
    encoder, model = _loaded(config)
    if config.model.lora.r:
        add_adapters(model, config.model.lora, seed=0)  # whose values the checkpoint has
    module = TrainingModule(model)
    _load(CheckpointStore(kept, keep=1, world=World()), step, module)
    if merge:
        merge_adapters(model)
    weights = model.state_dict() if merge else full_weights(module)
    return write_model(model, weights, to, base=config.model.path, dtype=_dtype(config, dtype), encoder=encoder)


def _load(store: CheckpointStore, step: int | None, module: TrainingModule) -> None:
    """Load a checkpoint, the newest one without a step: again, if a run that saves beside this removed it."""
    while True:
        there = store.steps()
        try:
            store.load(there[0] if step is None else step, module, None)
            return
        except Exception as error:  # whichever of its files was missed first
            if step is None and store.steps()[:1] != there[:1]:
                continue
            if step is None and there[1:] and isinstance(error, CheckpointError):
                error.args = (f"{error}; --step {there[1]} exports the one before it",)
            raise


def write_merged(config: RunConfig, adapters: Path, to: Path, *, dtype: str) -> Path:
    """Write the whole model of adapters that a run has exported, with these in its weights."""
    encoder, model = _loaded(config)
    add_adapters(model, config.model.lora, seed=0)
    read_adapters(model, adapters)
    merge_adapters(model)
    kind = _dtype(config, dtype)
    return write_model(model, model.state_dict(), to, base=config.model.path, dtype=kind, encoder=encoder)


def _loaded(config: RunConfig) -> tuple[Encoder, PreTrainedModel]:
    return encoder_for(load_tokenizer(config.model.path), config.data), load_model(config.model.path)


def _dtype(config: RunConfig, given: str) -> str:
    return config.model.dtype if given == "auto" else given


def write_model(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], to: Path, *, base: str, dtype: str, encoder: Encoder
) -> Path:
    """Write trained weights with what the encoder knows: tokenizer, template, stop ids.

    Of a model with adapters only those are written.

    dtype  auto: the dtype the base model was stored in, or for adapters that of their training
    """
    own = torch.float32 if adapter_config(model) else stored_dtype(base)
    return export_model(
        model,
        encoder.tokenizer,
        to,
        state_dict=weights,
        dtype=own if dtype == "auto" else getattr(torch, dtype),
        base=base,
        stop_ids=encoder.stop_ids,
        chat_template=encoder.chat_template,
    )
