"""Hugging Face causal language models and tokenizers: loading, and what can be known before any weight is read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sftmix.common.errors import ConfigError
from sftmix.common.files import sha256_file, sha256_json
from sftmix.model.paths import model_place, refuse_adapters

# ------------------------------------------------------------------------------------------------- loading


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: Any | None = None,
) -> PreTrainedModel:
    """The causal language model of a hub id or directory, weights cast to `dtype`, vocabulary as it is.

    quantization  a transformers quantisation config (`sftmix.model.adapters.quantization_config`)

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
    rows = n_embeddings(model)
    if len(tokenizer) > rows:
        raise ConfigError(
            f"model.path: the tokenizer has {len(tokenizer)} ids, the model embeddings for {rows}: they do not belong "
            "together, or tokens were added to the tokenizer without resizing the model."
        )


def n_embeddings(model: PreTrainedModel) -> int:
    """Token ids that the model has an embedding for."""
    weight: Any = model.get_input_embeddings().weight
    return weight.shape[0]


def _from_pretrained(auto: Any, path: str | Path, **options: Any) -> Any:
    name, local = model_place(path)
    if auto is not AutoTokenizer:
        refuse_adapters(path)
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        offline = "" if local else " (no directory here; as a hub id: is it spelt right, is there a network?)"
        raise ConfigError(f"model.path: cannot load {path}{offline}: {error}") from error


MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""What decides weights, tokenizer and chat template of a model directory."""


def context_length(path: str) -> int | None:
    """Positions the model was made for; None where its config does not say."""
    return getattr(model_config(path).get_text_config(), "max_position_embeddings", None)


def fingerprint(path: str) -> str:
    """Identity of a file's content, or of a model and its tokenizer: a hub model's commit, or a directory's hash."""
    if Path(path).is_file():
        return _hash(Path(path))
    commit = getattr(model_config(path), "_commit_hash", None)
    if commit:
        return f"{path}@{commit}"
    files = sorted(p for p in Path(path).expanduser().iterdir() if p.suffix in MODEL_FILES)
    return sha256_json({p.name: _hash(p) for p in files})


def _hash(path: Path) -> str:
    """Hash of a file, read once per process as long as its size and time stay the same: weights take seconds."""
    about = path.stat()
    return _hash_of(path, about.st_size, about.st_mtime_ns)


@cache
def _hash_of(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)
