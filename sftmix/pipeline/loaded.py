"""Models in memory: those that a run trains and scores with, their export, and finished ones, which answer."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from sftmix.common.errors import ConfigError, NonFiniteError
from sftmix.common.files import sha256_json
from sftmix.common.places import place_of
from sftmix.common.plain import as_list
from sftmix.common.rng import stable_hash
from sftmix.common.world import World, accelerator
from sftmix.config import RunConfig
from sftmix.config.checks import refuse_sharded
from sftmix.config.read import as_started, made_from, read_finished
from sftmix.data import Encoder, encoder_for
from sftmix.model.adapters import (
    add_adapters,
    load_adapters,
    merge_adapters,
    quantization_config,
    read_adapters,
    stored_config,
)
from sftmix.model.export import export_model
from sftmix.model.head import check_head
from sftmix.model.layers import keep_in_bfloat16
from sftmix.model.load import check_ids, fingerprint, load_model, load_tokenizer, stored_dtype
from sftmix.model.meta import carry, empty_model, mapped_model, take_values
from sftmix.model.paths import named
from sftmix.model.probes import context_length, longest_together, probe_logits
from sftmix.model.rounding import kept_in_float32, round_in_place
from sftmix.options import SHARDED, DataOptions, LoraOptions, ModelOptions, TrainingOptions
from sftmix.pipeline.finished import FinishedModel
from sftmix.pipeline.nodes import check_same_model
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import resolve_parallel, resolve_precision, training_module, unwrap
from sftmix.training.scoring import Scorer


def check_sharing(config: RunConfig, world: World) -> bool:
    """Return whether ranks share the weights; ConfigError for an optimizer or adapters that cannot be shared."""
    sharded = resolve_parallel(config.training.parallel, world) in SHARDED
    if sharded:
        refuse_sharded(config.optimizer, config.model.lora, f"training.parallel {config.training.parallel} (here fsdp)")
    return sharded


def load_for_run(config: RunConfig, world: World, *, trains: bool = False) -> PreTrainedModel:
    """Load the model of a configuration, add its adapters, and check it by a probe (`check_head`).

    If ranks share the weights, it is on the meta device and carries its values (`sftmix.model.meta`); it is checked
    once they are in place.
    """
    gc.collect()  # the weights of the stage before, which modules keep alive in cycles
    with contextlib.suppress(AttributeError, TypeError):  # glibc alone has it, and would keep what was freed
        ctypes.CDLL(None).malloc_trim(0)
    path, attention, lora = config.model.path, config.model.attention, config.model.lora
    sharded = check_sharing(config, world)
    check_same_model(path, world)
    halved = resolve_precision(config.training.precision, world.device) == "bf16"
    compute = torch.bfloat16 if halved else torch.float32
    quantization = quantization_config(lora, compute=compute)

    def whole() -> PreTrainedModel:
        model = load_model(path, attention=attention, quantization=quantization)
        if lora.r:
            # Some are made of the model's values.
            add_adapters(model, lora, seed=stable_hash(config.seed, "adapters") % 2**63)
        return model

    check = partial(check_head, trains=trains)
    if not sharded:
        model = whole()
        check(model)
    else:
        mapped = None if lora.r else mapped_model(path, attention=attention)
        # Every rank maps the files, if it can; else rank 0 loads them and sends the values.
        loaded = mapped or world.on_main(whole)
        tied = world.share(loaded and loaded.config.get_text_config().tie_word_embeddings)
        model = loaded or empty_model(path, attention=attention, tied=tied)
        if lora.r and loaded is None:
            add_adapters(model, replace(lora, init_lora_weights=True), seed=0)
        values = take_values(model)
        carry(model, values if loaded else {}, world, from_main=mapped is None, checks=[check])
    if stored_dtype(path) == compute == torch.bfloat16 and (lora.r or not trains):  # a trained model is exported whole
        keep_in_bfloat16(model, trains=trains)
    return model


def scorer(options: TrainingOptions, world: World, encoder: Encoder, *, name: str, token_nll: bool = False) -> Scorer:
    """Make the scorer of rows under a wrapped module, for the stage of that name.

    options    whose precision counts
    token_nll  also keep the NLL of every response token
    """
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
) -> tuple[Scorer, nn.Module]:
    """Return a model that is not trained, wrapped, and the scorer of rows under it, for the stage of that name.

    packed  True if some rows hold several documents
    lora    whose base the model is, quantised as there; None: weights as they are stored
    """
    options = config.training
    config = replace(config, model=replace(config.model, path=path, lora=lora or LoraOptions()))
    score = scorer(options, world, encoder, name=name, token_nll=token_nll)
    model = load_for_run(config, world)
    attention = config.model.attention
    module = training_module(model, options, precision=score.precision, world=world, attention=attention, packed=packed)
    return score, module


def export_dtype(options: ModelOptions, dtype: str = "auto", *, merged: bool = False) -> torch.dtype:
    """Return the dtype of exported weights.

    dtype   auto: that of the options, which may be auto, too: then the dtype the base model was stored in, or for
            adapters that of their training
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
    weights = {name: x for name, x in full_weights(module, gathered=False).items() if not kept.search(name)}
    round_in_place(weights, dtype, rounding=config.checkpoint.rounding, seed=config.seed)


def export_weights(
    config: RunConfig,
    encoder: Encoder,
    model: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    to: Path,
    dtype: torch.dtype,
) -> Path:
    """Write weights as a Hugging Face directory, with what the encoder knows: tokenizer, template, stop ids.

    For a model with adapters only those are written.

    weights  those that `round_weights` has rounded to `dtype`
    """
    return export_model(
        model,
        encoder.tokenizer,
        to,
        state_dict=weights,
        dtype=dtype,
        base=config.model.path,
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
            except Exception:  # a run beside this may have removed it, whichever file was missed first
                if step is not None or store.steps() == steps:
                    raise
    if merge:
        merge_adapters(model)
    exported = export_dtype(config.model, dtype, merged=merge)
    round_weights(config, module, exported)
    return export_weights(config, encoder, model, full_weights(module), to, exported)


# ------------------------------------------------------------------------------------------- finished models


class LoadedModel(NamedTuple):
    """A model in eval mode, and how conversations become its token ids.

    encoder   tokenizer and chat template; of a run those of its training, for all models of the run
    stop_ids  ids at which an answer ends: the end of a turn, eos, and those of the model's generation_config
    context   positions that the model was made for; None if its config does not say
    """

    name: str
    model: PreTrainedModel
    encoder: Encoder
    stop_ids: tuple[int, ...]
    context: int | None
    together: int  # the length of rows up to which a batch changes no answer

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), **variables: Any
    ) -> list[int]:
        """Return the ids of the prompt: the conversation so far and the generation prompt, as in training.

        Special tokens that a turn spells are text, unless the run was trained on them as tokens.

        messages   [{role: ..., content: ..., and thought, tool_calls, tool_call_id, name}, ...], the last one of a user
                   or a tool
        tools      the functions that the assistant may call
        variables  values of the template's variables
        Raises `sftmix.data.templates.TemplateRefusal` where the template refuses the conversation, ConfigError where it
        has a token without an embedding.
        """
        ids = self.encoder.prompt(messages, tools, **variables)
        with named(f"model {self.name}"):
            check_ids(self.model.config, self.encoder.tokenizer, ids)
        return ids

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode an answer, without the end of its turn and what the template writes around it."""
        layout = self.encoder.layout
        assert layout is not None
        tokenizer: Any = self.encoder.tokenizer
        answer = list(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)
        lead = self.encoder.tokenize([layout.answer_lead])[0] if layout.answer_lead else []
        answer = answer[len(lead) :] if answer[: len(lead)] == lead else answer
        text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.removeprefix(layout.answer_lead).removesuffix(layout.ending.removesuffix(layout.end))


def weights_of(finished: FinishedModel) -> str:
    """Return the identity of a model's weights; of adapters that are no run's, their base model's as well."""
    own, directory = fingerprint(finished.path), Path(finished.path)
    if finished.run is None and (directory / "adapter_config.json").exists():
        return sha256_json([own, fingerprint(stored_config(directory).base_model_name_or_path)])
    return own


def load_finished(finished: FinishedModel, dtype: str = "auto") -> LoadedModel:
    """Load a model with its tokenizer, on a GPU if there is one; adapters are loaded onto their base model.

    dtype  of the weights, by its name in torch; auto: as they are stored
    Raises ConfigError if the model cannot be loaded or its tokenizer does not fit, NonFiniteError if it computes NaN.
    """
    encoder, directory = encoder_of(finished), Path(finished.path)
    options = ModelOptions() if finished.run is None else read_finished(finished.run).model
    asked = None if dtype == "auto" else getattr(torch, dtype)
    adapters = (directory / "adapter_config.json").exists()
    with named(f"model {finished.name}"), as_started(finished.run):
        base = finished.path
        if adapters:  # of a run its own record of the base counts, which is found after a move, too
            base = options.path or stored_config(directory).base_model_name_or_path
        kind = asked or stored_dtype(base)
        quantization = None
        if adapters or finished.name == "base":  # of a run with adapters: quantised as it was in training
            quantization = quantization_config(options.lora, compute=kind if adapters else asked or torch.float32)
        model = load_model(base, dtype=kind, attention=options.attention, quantization=quantization)
        if adapters:
            load_adapters(model, directory)
        check_ids(model.config, encoder.tokenizer, [encoder.pad_id, *encoder.stop_ids])
    if getattr(model, "hf_device_map", None) is None:  # 4-bit weights lie where they were loaded
        model.to(accelerator())  # type: ignore[arg-type]
    ends = {*encoder.stop_ids, *as_list(getattr(model.generation_config, "eos_token_id", None))} - {None}
    model.generation_config = GenerationConfig()  # the base model's own sampling options would enter every answer
    model.config.get_text_config().output_router_logits = False  # of a batch with padding their balance has no value
    if not (probe_logits(model.eval()) < torch.inf).all():  # NaN: it would answer with token 0 for ever; -inf is usual
        raise NonFiniteError(
            f"{finished.path}: its logits are not finite in {model.dtype}, so its answers would mean nothing. Its "
            "weights are broken, or they are too large for this dtype: try --dtype float32"
        )
    context = context_length(model.config)
    return LoadedModel(finished.name, model, encoder, tuple(ends), context, longest_together(model, finished.name))


def encoder_of(finished: FinishedModel) -> Encoder:
    """Return the encoder of the run's training; of other models, and after plain text, the tokenizer's own template."""
    path, options = finished.path, DataOptions()
    with named(f"model {finished.name}"), as_started(finished.run):
        if finished.run is not None:
            config = read_finished(finished.run)
            path, options = config.model.path, options if config.data.format == "text" else config.data
            check_base(finished.run, path)
            exported = finished.run / "train/model"
            if exported.is_dir() and options is config.data:  # its template has the generation prompt of the rows
                path, options = str(exported), replace(options, template=None, template_options=None)
        return encoder_for(load_tokenizer(path), options, thinks=None)


def check_base(run: Path, path: str) -> None:
    """Raise ConfigError unless the base model of a run is the one that the run was made from; call it in `as_started`.

    path  of the model in the run's configuration
    """
    then, place = made_from(run)["model"], place_of(path)
    there = os.path.isdir(place) or "@" in then  # else a hub may have something of that name
    if then and not (there and fingerprint(path) == then):
        raise ConfigError(
            f"model.path: {path} ({place.absolute()}) is not the model that {run} was made from: its files are others, "
            "or gone. Bring them back; or if that model lies elsewhere now, write its place as model.path into "
            f"{run / 'config.yaml'}"
        )
