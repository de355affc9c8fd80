"""The models of a run: loaded, whole or to be sharded, with their adapters; the scorers of rows; the export."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from sftmix.common.errors import CheckpointError
from sftmix.common.rng import stable_hash
from sftmix.common.world import World
from sftmix.config import RunConfig
from sftmix.config.checks import refuse_sharded
from sftmix.data import Encoder, encoder_for
from sftmix.model.adapters import adapter_config, add_adapters, merge_adapters, quantization_config, read_adapters
from sftmix.model.export import export_model
from sftmix.model.head import check_head
from sftmix.model.load import check_vocabulary, load_model, load_tokenizer, stored_dtype
from sftmix.model.meta import Values, empty_model, mapped_model, take_values
from sftmix.options import SHARDED, LoraOptions, TrainingOptions
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import resolve_parallel, resolve_precision, training_module
from sftmix.training.scoring import Scorer


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
    attention, adapter_seed = config.model.attention, stable_hash(seed, "adapters") % 2**63
    precision = resolve_precision(options.precision, world.device)
    quantization = quantization_config(lora, compute=torch.bfloat16 if precision == "bf16" else torch.float32)

    def whole() -> PreTrainedModel:
        model = load_model(path, attention=attention, quantization=quantization)
        if lora.r:
            add_adapters(model, lora, seed=adapter_seed)  # some are made of the model's values
        return model

    mapped = mapped_model(path, attention=attention) if sharded and not lora.r else None
    # Every rank maps the files, if it can; else rank 0 loads them and sends the values.
    loaded = mapped or (world.on_main(whole) if sharded else whole())
    model = loaded or empty_model(path, attention=attention)
    if lora.r and loaded is None:
        add_adapters(model, replace(lora, init_lora_weights=True), seed=0)
    check_vocabulary(model, encoder.tokenizer)
    if not sharded:
        check_head(model)
        return model, None
    values = take_values(model)
    return model, Values(model, values if loaded else {}, world, from_main=mapped is None, checks=[check_head])


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
    adapters: Path | None = None,
    token_nll: bool = False,
) -> tuple[Scorer, nn.Module]:
    """Return a model that is not trained, wrapped, and the scorer of rows under it, for the stage of that name.

    packed    True if some rows hold several documents
    lora      adapter options; None: no adapters, and weights as they are stored
    adapters  directory with the values of the adapters
    """
    options = config.training
    model, values = load_for_run(config, world, path, encoder, options, lora or LoraOptions())
    if adapters is not None:
        read_adapters(model, adapters)
    score = scorer(options, world, encoder, name=name, token_nll=token_nll)
    module = training_module(model, options, precision=score.precision, world=world, packed=packed, values=values)
    return score, module


def export_weights(
    config: RunConfig,
    encoder: Encoder,
    model: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    to: Path,
    *,
    dtype: str = "auto",
) -> Path:
    """Write weights as a Hugging Face directory, with what the encoder knows: tokenizer, template, stop ids.

    Of a model with adapters only those are written.

    dtype  auto: that of the configuration, which may be auto, too: then the dtype the base model was stored in, or for
           adapters that of their training
    """
    base, dtype = config.model.path, config.model.dtype if dtype == "auto" else dtype
    stored = torch.float32 if adapter_config(model) else stored_dtype(base)
    return export_model(
        model,
        encoder.tokenizer,
        to,
        state_dict=weights,
        dtype=stored if dtype == "auto" else getattr(torch, dtype),
        base=base,
        stop_ids=encoder.stop_ids,
        chat_template=encoder.chat_template,
    )


def export_stored(config: RunConfig, source: Path, to: Path, *, step: int | None, dtype: str, merge: bool) -> Path:
    """Write what a run has stored as a Hugging Face directory.

    source  a folder of checkpoints, of which `step` counts, or the newest one; or a directory of adapters
    merge   write the whole model with the adapters in its weights
    """
    model, encoder = load_model(config.model.path), encoder_for(load_tokenizer(config.model.path), config.data)
    if config.model.lora.r:
        add_adapters(model, config.model.lora, seed=0)  # whose values are in `source`
    module = TrainingModule(model)
    if (source / "adapter_config.json").exists():
        read_adapters(model, source)
    else:
        store = CheckpointStore(source, keep=1, world=World())
        while True:
            steps = store.steps()
            try:
                store.load(steps[0] if step is None else step, module, None)
                break
            except Exception as error:  # a run beside this may have removed it, whichever file was missed first
                if step is None and store.steps()[:1] != steps[:1]:
                    continue
                if step is None and steps[1:] and isinstance(error, CheckpointError):
                    error.args = (f"{error}; --step {steps[1]} exports the one before it",)
                raise
    if merge:
        merge_adapters(model)
    return export_weights(
        config, encoder, model, model.state_dict() if merge else full_weights(module), to, dtype=dtype
    )
