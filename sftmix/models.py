"""Hugging Face causal language models: loading, access to the LM head, export.

The loss multiplies hidden states with the head itself, so it must know everything the model does to them on the way to
its logits: `check_head` compares both on a probe batch and refuses a model where they differ.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sftmix.adapters import adapter_config, check_adapted_head, effective_bias, effective_weight, write_adapters
from sftmix.errors import ConfigError

# ------------------------------------------------------------------------------------------------- loading


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: Any | None = None,
) -> PreTrainedModel:
    """The causal language model of a hub id or directory, weights cast to `dtype`, vocabulary as it is.

    quantization  a transformers quantisation config (`sftmix.adapters.quantization_config`)

    Reads safetensors only and runs no code that comes with the model. ConfigError where there is no such model, where
    it needs such code or has no safetensors, or where weights are missing (they would be random).
    """
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantization is not None:
        options["quantization_config"] = quantization
    model, info = _from_pretrained(AutoModelForCausalLM, path, **options)
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:5])
        raise ConfigError(f"model.path: {path} has no values for {len(missing)} weights of the model ({shown}, ...).")
    if quantization is not None:
        _keep_the_backward(model)
    return model


def _keep_the_backward(model: PreTrainedModel) -> None:
    """Keep 4-bit weights as they are.

    On a CPU with bf16 instructions bitsandbytes repacks them in the first forward in eval mode, for a kernel without a
    gradient: scoring between two steps would end the training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, of a class that is not imported here


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or directory; ConfigError where there is none or it needs code of its own."""
    return _from_pretrained(AutoTokenizer, path)


def model_config(path: str | Path) -> PretrainedConfig:
    """The config of a hub id or directory; ConfigError where there is none or it needs code of its own."""
    return _from_pretrained(AutoConfig, path)


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype the model's config says its weights are stored in (float32 where it says nothing)."""
    dtype = model_config(path).get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids the model has no embedding for (spare embeddings are normal; nothing is resized)."""
    rows = _embeddings(model)
    if len(tokenizer) > rows:
        raise ConfigError(
            f"model.path: the tokenizer has {len(tokenizer)} ids, the model embeddings for {rows}: they do not belong "
            "together, or tokens were added to the tokenizer without resizing the model."
        )


def _embeddings(model: PreTrainedModel) -> int:
    weight: Any = model.get_input_embeddings().weight
    return weight.shape[0]


def _from_pretrained(auto: Any, path: str | Path, **options: Any) -> Any:
    name = str(path)
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()
    name = os.path.expanduser(name) if local else name
    if not name or (local and not Path(name).is_dir()):
        raise ConfigError(f"model.path: {path} is not a directory. Give a hub id or a directory with a model.")
    if auto is not AutoTokenizer and (Path(name) / "adapter_config.json").exists():
        raise ConfigError(f"model.path: {path} holds adapters, not a model: sftmix export RUN --merge makes one.")
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        offline = "" if local else " (no directory here; as a hub id: is it spelt right, is there a network?)"
        raise ConfigError(f"model.path: cannot load {path}{offline}: {error}") from error


# ---------------------------------------------------------------------------------------------------- head


@dataclass(frozen=True)
class Head:
    """logits = softcap tanh(scale (hidden W^T + bias) / softcap), without the cap where softcap is None.

    Weight and bias are read from the module at each use: FSDP exchanges them. With an adapter on the head, W is the
    effective weight, which each use of `weight` computes anew.
    """

    module: Any
    softcap: float | None
    scale: float

    @property
    def weight(self) -> Tensor:
        return effective_weight(self.module)

    @property
    def bias(self) -> Tensor | None:
        return effective_bias(self.module)

    def logits(self, hidden: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """The formula above, for probes and measurements; what follows the matmul in `dtype` (None: its own)."""
        z = self.scale * F.linear(hidden, self.weight, self.bias).to(dtype)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """[B, L, D], what the LM head receives (after the final norm), by one pass of the backbone alone."""
    decoder = model.get_decoder()
    return decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def head_of(model: PreTrainedModel) -> Head:
    """The model's LM head with its scale and soft-cap, from its config; by `check_head` where that is ambiguous.

    A model on the meta device has no logits to decide by: there it is the first reading, until `check_head` can.
    """
    candidates = _candidates(model)
    return candidates[0] if len(candidates) == 1 or model.device.type == "meta" else check_head(model)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> Head:
    """The head whose logits equal `model(...).logits` on a probe batch; ConfigError if the formula does not fit."""
    candidates = _candidates(model)
    name = f"{type(model).__name__} ({model.config.model_type})"
    ids = (torch.arange(2 * 8, device=model.device) * 7919 % _embeddings(model)).view(2, 8)
    mask = torch.ones_like(ids)
    training = model.training
    model.eval()
    try:
        hidden = hidden_states(model, ids, mask)
        theirs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.double()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model.path: {name} does not run as backbone and head: {error}") from error
    finally:
        model.train(training)
    best, difference = _closest(candidates, hidden, theirs)
    # The same matmul twice: only the rounding of a scale or cap may differ.
    limit = {torch.float64: 1e-9, torch.float32: 1e-4}.get(hidden.dtype, 1e-2) * float(theirs.abs().max())
    if not difference <= limit:
        raise ConfigError(
            f"model.path: {name} is not supported: its logits differ from softcap(scale (hidden W^T + bias)) by up to "
            f"{difference:.3g} on a probe batch (allowed: {limit:.3g}), so the loss would train another model."
        )
    return best


def _closest(candidates: Sequence[Head], hidden: Tensor, theirs: Tensor) -> tuple[Head, float]:
    best, smallest = candidates[0], float("inf")
    for head in candidates:
        ours = head.logits(hidden).double()
        if ours.shape == theirs.shape and (difference := float((ours - theirs).abs().max())) < smallest:
            best, smallest = head, difference
    return best, smallest


def _candidates(model: PreTrainedModel) -> list[Head]:
    """Every reading of what the config says about the head; one, for a model without scale or cap."""
    module = model.get_output_embeddings() if hasattr(model, "get_decoder") else None
    if module is None or model.config.is_encoder_decoder:
        raise ConfigError(f"model.path: {type(model).__name__} is not a decoder with an LM head.")
    check_adapted_head(module)
    config = model.config.get_text_config()
    factors = (
        _number(config, "logit_scale"),
        _number(config, "lm_head_multiplier"),
        _number(config, "output_multiplier"),
    )
    scales = [x for x in factors if x]
    if scaling := _number(config, "logits_scaling"):
        scales += [1 / scaling, scaling]  # Granite divides by it, HyperCLOVA X multiplies
    caps = [x for x in (_number(config, "final_logit_softcapping"),) if x]
    return [Head(module, cap, scale) for cap, scale in product(_or(caps, None), _or(scales, 1.0))]


def _number(config: Any, key: str) -> float | None:
    value = getattr(config, key, None)
    return float(value) if isinstance(value, (int, float)) else None


def _or(named: list[Any], neutral: Any) -> list[Any]:
    """The named values without repeats, or the neutral one where there are none."""
    return list(dict.fromkeys(named)) or [neutral]


# -------------------------------------------------------------------------------------------------- export


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    dtype: torch.dtype,
    state_dict: Mapping[str, Tensor] | None = None,
    base: str = "",
    stop_ids: Iterable[int] = (),
    chat_template: str | None = None,
) -> Path:
    """Write a directory that AutoModelForCausalLM and AutoTokenizer load, and return it; complete or not there at all.

    state_dict     full (gathered) weights; None: the model's own. Tied weights are stored once.
    dtype          of the files and of the config
    base           of a model with adapters: what they belong to; only they are written, as PEFT does it
    stop_ids       end-of-turn ids, beside the eos ids of the tokenizer and of the model's generation_config
    chat_template  the Jinja template the model was trained with; None: the tokenizer's own
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        generation = _generation_config(model, tokenizer, stop_ids)
        if adapter_config(model) is None:
            _write_model(model, temporary, _cast(model, state_dict, dtype), dtype, generation)
        else:
            weights = model.state_dict() if state_dict is None else state_dict
            write_adapters(model, weights, temporary, base=base, dtype=dtype)
            generation.save_pretrained(temporary)
        own = copy.deepcopy(tokenizer)
        if chat_template is not None:
            own.chat_template = chat_template
        own.save_pretrained(temporary)
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _cast(model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights to store: floats in `dtype`, of a tied group only the first name (gathering loses the aliasing)."""
    names: dict[int, str] = {}
    aliases = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if names.setdefault(id(parameter), name) != name
    }
    state = model.state_dict() if state_dict is None else state_dict
    return {
        name: x.detach().to(dtype if x.is_floating_point() else x.dtype).contiguous()
        for name, x in state.items()
        if name not in aliases
    }


def _write_model(
    model: PreTrainedModel, path: Path, state: dict[str, Tensor], dtype: torch.dtype, generation: GenerationConfig
) -> None:
    before = model.config, model.generation_config
    try:
        model.config, model.generation_config = copy.deepcopy(model.config), generation
        model.save_pretrained(path, state_dict=state)  # writes into the config
        model.config.dtype = dtype
        model.config.save_pretrained(path)
    finally:
        model.config, model.generation_config = before


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]
) -> GenerationConfig:
    config = copy.deepcopy(model.generation_config)
    theirs = config.eos_token_id
    ids = [tokenizer.eos_token_id, *(theirs if isinstance(theirs, list) else [theirs]), *stop_ids]
    unique = list(dict.fromkeys(int(i) for i in ids if i is not None))
    config.eos_token_id = unique[0] if len(unique) == 1 else unique or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True  # sampling options without it: common on the hub, and refused when written
    return config


def _replace(source: Path, target: Path) -> None:
    """Put a finished directory in its place; what was there goes only when the new one stands."""
    for file in source.rglob("*"):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    old = target.with_name(f".old-{target.name}.{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)
