"""Models in memory: those that a run trains and scores with, and their export."""

import contextlib
import ctypes
import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from sftmix.config import RunConfig
from sftmix.config.checks import refuse_sharded
from sftmix.model.adapters import add_adapters, all_in_peft_format, quantization_config
from sftmix.model.compared import say_once
from sftmix.model.export import export_model
from sftmix.model.head import check_head
from sftmix.model.layers import keep_in_bfloat16
from sftmix.model.load import fingerprint, load_model, stored_dtype
from sftmix.model.mapped import empty_model, mapped_model, standing_in
from sftmix.model.meta import carry
from sftmix.model.probes import before_adapters
from sftmix.model.rounding import kept_in_float32, round_in_place
from sftmix.options.model import LoraOptions, ModelOptions
from sftmix.options.training import SHARDED, TrainingOptions
from sftmix.pipeline.nodes import check_same
from sftmix.ranks.rng import stable_hash
from sftmix.ranks.world import World
from sftmix.text.encoder import Encoder
from sftmix.training.checkpoint import own_weights, whole_weights
from sftmix.training.parallel import resolve_parallel, resolve_precision, training_module, unwrap
from sftmix.training.scoring import Scorer


def check_sharing(config: RunConfig, world: World) -> bool:
    """Return whether ranks share the weights; ConfigError for an optimizer or adapters that cannot be shared."""
    sharded = resolve_parallel(config.training.parallel, world) in SHARDED
    if sharded:
        refuse_sharded(config.optimizer, config.model.lora, f"training.parallel {config.training.parallel} (here fsdp)")
    return sharded


def return_memory() -> None:
    """Give freed memory back: the weights, gradients and optimizer of what was trained before."""
    gc.collect()  # modules keep their weights alive in cycles
    with contextlib.suppress(AttributeError, TypeError):  # glibc alone has it, and would keep what was freed
        ctypes.CDLL(None).malloc_trim(0)


def load_for_run(
    config: RunConfig, world: World, *, trains: bool = False, ends: Sequence[tuple[int, str]] = ()
) -> PreTrainedModel:
    """Load the model of a configuration, add its adapters, and check it by a probe (`check_head`).

    If ranks share the weights, it is on the meta device and carries its values (`sftmix.model.meta`); it is checked
    once they are in place.

    ends  ids and tokens that end answers, whose rows adapters may not mend
    """
    return_memory()
    path, attention, lora = config.model.path, config.model.attention, config.model.lora
    sharded = check_sharing(config, world)
    check_same(lambda: {"model.path": fingerprint(path)}, world)
    halved = resolve_precision(config.training.precision, world.device) == "bf16"
    compute = torch.bfloat16 if halved else torch.float32
    quantization = quantization_config(lora, compute=compute)

    def adapted(model: PreTrainedModel) -> PreTrainedModel:
        if lora.r:
            with standing_in(model):
                add_adapters(model, lora, seed=stable_hash(config.seed, "adapters") % 2**63)
            if trains:
                _before_adapters(model, path, ends, world)
        return model

    def whole() -> PreTrainedModel:
        return adapted(load_model(path, attention=attention, quantization=quantization))

    check = partial(check_head, trains=trains)
    if not sharded:
        model = whole()
        check(model)
    else:
        # DoRA's magnitudes are made of the model's values, in float32.
        mapped = None if lora.use_dora else mapped_model(path, attention=attention)
        # Every rank maps the files, if it can; else rank 0 loads them and sends the values.
        loaded = adapted(mapped) if mapped else world.on_main(whole)
        # As the files decide, which only ranks with the values know: config.json may say otherwise.
        tied = world.share(loaded and loaded.config.get_text_config().tie_word_embeddings)
        model = loaded or empty_model(path, attention=attention, tied=tied)
        if lora.r and loaded is None:
            add_adapters(model, replace(lora, init_lora_weights=True), seed=0)  # their shapes: the values are rank 0's
        carry(model, world, from_main=mapped is None, check=check)
    if stored_dtype(path) == compute == torch.bfloat16 and (lora.r or not trains):  # a trained model is exported whole
        keep_in_bfloat16(model, trains=trains)
    return model


def _before_adapters(model: PreTrainedModel, path: str, ends: Sequence[tuple[int, str]], world: World) -> None:
    """Refuse adapters that could not be written after the training, on every rank; rank 0 says `before_adapters`."""
    all_in_peft_format(model, dict(model.named_parameters()))
    if world.is_main:
        for line in before_adapters(model, path, ends):
            say_once(line)


def make_scorer(
    options: TrainingOptions, world: World, encoder: Encoder, *, name: str, keep: Sequence[str] = ()
) -> Scorer:
    """Make the scorer of rows under a wrapped module, for the stage of that name.

    options  whose precision counts
    keep     as in Scorer
    """
    return Scorer(
        world=world,
        precision=resolve_precision(options.precision, world.device),
        pad_id=encoder.pad_id,
        keep=keep,
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
    keep: Sequence[str] = (),
) -> tuple[Scorer, nn.Module]:
    """Return a model that is not trained, wrapped, and the scorer of rows under it, for the stage of that name.

    packed  True if some rows hold several documents
    lora    whose base the model is, quantised as there; None: weights as they are stored
    """
    options = config.training
    config = replace(config, model=replace(config.model, path=path, lora=lora or LoraOptions()))
    score = make_scorer(options, world, encoder, name=name, keep=keep)
    model = load_for_run(config, world)
    attention = config.model.attention
    module = training_module(model, options, precision=score.precision, world=world, attention=attention, packed=packed)
    return score, module


def export_dtype(options: ModelOptions, dtype: str = "auto", *, merged: bool = False) -> torch.dtype:
    """Return the dtype of exported weights.

    dtype   auto: that of the options. If that is auto as well: the dtype in which the base model was stored, and for
            adapters the dtype of their training
    merged  True: adapters are in the weights of the base model
    """
    name = options.dtype if dtype == "auto" else dtype
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if options.lora.r and not merged else stored_dtype(options.path)


def round_weights(config: RunConfig, module: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights that an export in `dtype` holds, in place: what is measured after that is what is delivered.

    Every rank calls it. Raises ConfigError for a weight that `dtype` has no room for.
    """
    kept = kept_in_float32(unwrap(module).model, dtype)
    weights = {name: x for name, x in own_weights(module).items() if not kept.search(name)}
    round_in_place(weights, dtype, rounding=config.checkpoint.rounding, seed=config.seed)


def export_weights(
    config: RunConfig, encoder: Encoder, module: nn.Module, to: Path, dtype: torch.dtype, world: World
) -> None:
    """Write weights as a Hugging Face directory, with what the encoder knows: tokenizer, template, stop ids.

    For a model with adapters only those are written. Every rank calls it; rank 0 writes each weight as it is gathered.

    module  wrapped, with the weights that `round_weights` has rounded to `dtype`
    """
    weights = whole_weights(own_weights(module))

    def write() -> None:
        try:
            export_model(
                unwrap(module).model,
                encoder.tokenizer,
                to,
                weights=weights,
                dtype=dtype,
                base=config.model.path,
                stop_ids=encoder.stop_ids,
                chat_template=encoder.chat_template,
            )
        finally:
            for _ in weights:  # also after an error: the others gather all of them
                pass

    if not world.is_main:
        for _ in weights:
            pass
    world.on_main(write)
