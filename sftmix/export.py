"""A checkpoint of a run as a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sftmix.config import RunConfig
from sftmix.data import Encoder, encoder_for
from sftmix.errors import ConfigError
from sftmix.models import export_model, load_model, load_tokenizer, stored_dtype
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.distributed import World
from sftmix.training.step import TrainingModule


def export_run(run: str | Path, to: str | Path, *, checkpoint: int | None = None, dtype: str = "auto") -> Path:
    """Write a checkpoint of the train stage of a run as a Hugging Face model directory.

    checkpoint  its step; None: the newest valid one
    Raises ConfigError where there is no such checkpoint or `to` exists, CheckpointError where it is damaged.
    """
    run, to = Path(run), Path(to)
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is not a run directory (it has no config.yaml)")
    if to.exists():
        raise ConfigError(f"{to} exists; name a directory that does not")
    config = RunConfig.read(run / "config.yaml")
    store = CheckpointStore(run / "train" / "checkpoints", keep=1, world=World())
    step = store.newest_valid() if checkpoint is None else checkpoint
    if step is None or step not in store.steps():
        raise ConfigError(f"{store.directory} has no checkpoint {'' if step is None else step}; it has {store.steps()}")
    encoder = encoder_for(load_tokenizer(config.model.path), config.data)
    module = TrainingModule(load_model(config.model.path))
    store.load(step, module, None)
    kind = config.model.dtype if dtype == "auto" else dtype
    return write_model(module.model, full_weights(module), to, base=config.model.path, dtype=kind, encoder=encoder)


def write_model(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], to: Path, *, base: str, dtype: str, encoder: Encoder
) -> Path:
    """Write trained weights with what the encoder knows: tokenizer, template, stop ids.

    dtype  auto: the dtype the base model was stored in
    """
    return export_model(
        model,
        encoder.tokenizer,
        to,
        state_dict=weights,
        dtype=stored_dtype(base) if dtype == "auto" else getattr(torch, dtype),
        stop_ids=encoder.stop_ids,
        chat_template=encoder.chat_template,
    )
