"""The models of a run: whole or to be sharded, with their adapters, and the scorers of rows under them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from sftmix.batches.rows import TokenisedRows
from sftmix.common.rng import stable_hash
from sftmix.common.world import World
from sftmix.config import RunConfig
from sftmix.config.checks import refuse_sharded
from sftmix.data import Encoder
from sftmix.model.adapters import add_adapters, quantization_config
from sftmix.model.head import check_head
from sftmix.model.load import check_vocabulary, load_model
from sftmix.model.meta import Values, empty_model, mapped_model, take_values
from sftmix.options import SHARDED, LoraOptions, TrainingOptions
from sftmix.training.parallel import resolve_parallel, resolve_precision, training_module
from sftmix.training.scoring import Scorer
from sftmix.types import RowScores


def load_for_run(
    config: RunConfig,
    world: World,
    path: str,
    encoder: Encoder,
    options: TrainingOptions,
    lora: LoraOptions,
    *,
    seed: int = 0,
) -> tuple[PreTrainedModel, Values | None]:
    """Load a model, add its adapters, and check its LM head and vocabulary.

    Where ranks share the weights, the model is on the meta device and the second part of the result holds its values;
    the LM head is checked once they are in place. Elsewhere the second part is None.
    """
    gc.collect()  # the weights of the stage before, which modules keep alive in cycles
    sharded = resolve_parallel(options.parallel, world) in SHARDED
    if sharded:
        refuse_sharded(config.optimizer, lora, f"training.parallel {options.parallel} (here fsdp)")
    attention = config.model.attention
    if sharded:
        return load_shards(attention, world, path, encoder, lora, seed)
    precision = resolve_precision(options.precision, world.device)
    quantization = quantization_config(lora, compute=torch.bfloat16 if precision == "bf16" else torch.float32)
    model = load_model(path, attention=attention, quantization=quantization)
    if lora.r:
        add_adapters(model, lora, seed=_adapter_seed(seed))
    check_head(model)
    check_vocabulary(model, encoder.tokenizer)
    return model, None


def load_shards(
    attention: str | None, world: World, path: str, encoder: Encoder, lora: LoraOptions, seed: int
) -> tuple[PreTrainedModel, Values]:
    """Load a model for sharding: every rank maps the files, or rank 0 loads them and sends the values."""
    if not lora.r and (model := mapped_model(path, attention=attention)) is not None:
        check_vocabulary(model, encoder.tokenizer)
        return model, Values(model, take_values(model), world, from_main=False, checks=[check_head])

    def whole() -> PreTrainedModel:
        model = load_model(path, attention=attention)
        if lora.r:
            add_adapters(model, lora, seed=_adapter_seed(seed))  # some are made of the model's values
        return model

    loaded = world.on_main(whole)
    model = loaded or empty_model(path, attention=attention)
    if lora.r and loaded is None:
        add_adapters(model, replace(lora, init_lora_weights=True), seed=0)
    check_vocabulary(model, encoder.tokenizer)
    values = take_values(model)
    return model, Values(model, values if loaded else {}, world, from_main=True, checks=[check_head])


def _adapter_seed(seed: int) -> int:
    return stable_hash(seed, "adapters") % 2**63


def scorer(options: TrainingOptions, world: World, encoder: Encoder, *, name: str, token_nll: bool = False) -> Scorer:
    """Make the scorer of rows under a wrapped module, for the stage of that name."""
    return Scorer(
        world=world,
        precision=resolve_precision(options.precision, world.device),
        pad_id=encoder.pad_id,
        token_nll=token_nll,
        progress=f"{name}: scoring",
    )


def scoring_model(
    config: RunConfig,
    world: World,
    path: str,
    encoder: Encoder,
    *,
    name: str,
    packed: bool,
    lora: LoraOptions | None = None,
    token_nll: bool = False,
) -> Callable[[TokenisedRows], RowScores]:
    """Load a model that is not trained and return its scorer of rows, for the stage of that name.

    packed  True if some rows hold several documents
    lora    adapter options, of which only the storage in 4 bits counts here; None: stored as it is
    """
    options = config.training
    model, values = load_for_run(config, world, path, encoder, options, lora or LoraOptions())
    precision = resolve_precision(options.precision, world.device)
    module = training_module(model, options, precision=precision, world=world, packed=packed, values=values)
    return partial(scorer(options, world, encoder, name=name, token_nll=token_nll), module)
