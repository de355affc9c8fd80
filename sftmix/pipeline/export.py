"""A checkpoint of a run as a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sftmix.common.errors import ConfigError
from sftmix.common.world import World
from sftmix.config.read import read_config
from sftmix.data import Encoder, encoder_for
from sftmix.model.adapters import adapter_config, add_adapters, merge_adapters
from sftmix.model.export import export_model
from sftmix.model.load import load_model, load_tokenizer, stored_dtype
from sftmix.pipeline.directory import origin
from sftmix.training.best import BEST
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.module import TrainingModule


def export_run(
    run: str | Path,
    to: str | Path,
    *,
    checkpoint: int | None = None,
    best: bool = False,
    dtype: str = "auto",
    merge: bool = False,
) -> Path:
    """Write a checkpoint of the train stage of a run as a Hugging Face model directory.

    checkpoint  its step; None: the newest valid one
    best        the weights of the best held-out evaluation, which a run with checkpoint.keep_best keeps
    merge       of a run with adapters: the whole model with the adapters in its weights, which loads without PEFT
    Raises ConfigError where there is no such checkpoint, `to` exists or there is nothing to merge, CheckpointError
    where it is damaged.
    """
    run, to = Path(run), Path(to)
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is not a run directory (it has no config.yaml)")
    if to.exists():
        raise ConfigError(f"{to} exists; name a directory that does not")
    config = read_config(run / "config.yaml")
    lora = config.model.lora
    if merge and not lora.r:
        raise ConfigError(f"--merge: {run} trained all weights (model.lora.r is not set); export it without --merge")
    if best and checkpoint is not None:
        raise ConfigError(f"--best and --step {checkpoint} exclude each other: each names a checkpoint")
    store = CheckpointStore(origin(run / "train") / (BEST if best else "checkpoints"), keep=1, world=World())
    if best and not store.steps():
        raise ConfigError(
            f"--best: {store.directory} has no weights; a run keeps those of its best evaluation with "
            "--checkpoint.keep_best true and held-out rows"
        )
    step = store.newest_valid() if checkpoint is None else checkpoint
    if step is None or step not in store.steps():
        raise ConfigError(f"{store.directory} has no checkpoint {'' if step is None else step}; it has {store.steps()}")
    encoder = encoder_for(load_tokenizer(config.model.path), config.data)
    model = load_model(config.model.path)
    if lora.r:
        add_adapters(model, lora, seed=0)  # whose values the checkpoint has
    module = TrainingModule(model)
    store.load(step, module, None)
    kind = config.model.dtype if dtype == "auto" else dtype
    if merge:
        merge_adapters(model)
    weights = model.state_dict() if merge else full_weights(module)
    return write_model(model, weights, to, base=config.model.path, dtype=kind, encoder=encoder)


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
