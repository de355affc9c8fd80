"""Hugging Face causal language models and tokenizers: loading, and the facts known before any weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, find_adapter_config_file

from sftmix.common.errors import ConfigError
from sftmix.common.files import sha256_file, sha256_json
from sftmix.common.progress import without_bars_of_transformers
from sftmix.model.paths import holds_adapters, model_place, refuse_adapters, refuse_pickles
from sftmix.model.unused import freeze_unused

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes by their names in safetensors files."""


# ------------------------------------------------------------------------------------------------- loading


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Load the causal language model of a hub id or directory: weights cast to `dtype`, vocabulary as it is.

    What text never goes through is frozen (`sftmix.model.unused`).

    quantization  a transformers quantisation config (`sftmix.model.adapters.quantization_config`)

    Reads safetensors only and runs no code that comes with the model. Raises ConfigError if there is no such model, if
    it needs such code or has no safetensors, or if weights are missing (they would be random).
    """
    kinds = {"dtype": dtype, "attn_implementation": attention, "quantization_config": quantization}
    options = {**kinds, "use_safetensors": True, "output_loading_info": True}
    model, info = _from_pretrained(AutoModelForCausalLM, path, **options)
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:5])
        raise ConfigError(f"model.path: {path} has no values for {len(missing)} weights of the model ({shown}, ...).")
    if quantization is not None:
        _keep_the_backward(model)
    return freeze_unused(model)


def _keep_the_backward(model: PreTrainedModel) -> None:
    """Keep 4-bit weights as they are.

    On a CPU with bf16 instructions bitsandbytes repacks them in the first forward in eval mode, for a kernel without a
    gradient: scoring between two steps would end the training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, of a class that is not imported here


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub id or directory; ConfigError if there is none or it needs code of its own."""
    return _from_pretrained(AutoTokenizer, path)


def model_config(path: str | Path) -> PretrainedConfig:
    """Load the config of a hub id or directory; ConfigError if there is none or it needs code of its own."""
    return _from_pretrained(AutoConfig, path)


def stored_dtype(path: str | Path) -> torch.dtype:
    """Return the dtype of the stored weights, by the model's config; float32 if it does not say."""
    config = model_config(path)
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def dtypes_of_files(path: str | Path) -> set[torch.dtype | None]:
    """Return the dtypes of all tensors in the files of a model that was loaded, None for one that is no float."""
    config = str(cached_file(str(Path(path).expanduser()), "config.json", local_files_only=True))
    files = [safe_open(file, framework="pt") for file in Path(config).parent.glob("*.safetensors")]
    return {_DTYPES.get(file.get_slice(name).get_dtype()) for file in files for name in file.keys()}  # noqa: SIM118


def refuse_quantized(path: str | Path) -> None:
    """Raise ConfigError for a model whose stored weights are quantised: they have no gradient to train them with."""
    config = model_config(path)
    for part in (config, config.get_text_config()):
        if stored := getattr(part, "quantization_config", None):
            raise ConfigError(
                f"model.path: the weights of {path} are quantised ({dict(stored).get('quant_method')}), and such "
                "weights cannot be trained. Name the model it was made from, or another copy that is not quantised; "
                "--model.lora.quantize 4bit quantises that one while it is loaded, and trains adapters"
            )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids that have no embedding (spare embeddings are normal; nothing is resized)."""
    rows = n_embeddings(model)
    if len(tokenizer) > rows:
        raise ConfigError(
            f"model.path: the tokenizer has {len(tokenizer)} ids, the model embeddings for {rows}: they do not belong "
            "together, or tokens were added to the tokenizer without resizing the model."
        )


def n_embeddings(model: PreTrainedModel) -> int:
    """Return the number of token ids that have an embedding."""
    weight: Any = model.get_input_embeddings().weight
    return weight.shape[0]


def probe_ids(model: PreTrainedModel, *shape: int) -> Tensor:
    """Return ids of this shape, spread over the vocabulary, on the device of the model."""
    return (torch.arange(math.prod(shape), device=model.device) * 7919 % n_embeddings(model)).view(shape)


@contextmanager
def probing(model: PreTrainedModel, problem: str, remedy: str = "") -> Iterator[None]:
    """Let a model run in eval mode and without gradients; ConfigError, `problem: error. remedy`, where it fails."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # which say nothing of the model
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(f"model.path: {problem}: {error}. {remedy}") from error
    finally:
        model.train(training)


def _from_pretrained(auto: Any, path: str | Path, **options: Any) -> Any:
    name, local = model_place(path)
    if auto is not AutoTokenizer:
        refuse_adapters(path)
        refuse_pickles(path)
        if not local and find_adapter_config_file(name) is not None:  # transformers would load another model, its base
            raise holds_adapters(path)
    try:
        with without_bars_of_transformers():
            return auto.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # files of strangers make transformers raise anything
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model.path: {path} needs code of its own (auto_map in its files), and code that comes with a model "
                "is never run. Name a model whose model_type and tokenizer are part of transformers, or convert this "
                "one to such a type"
            ) from error
        raise ConfigError(f"model.path: cannot load {path}: {error}") from error


MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""Suffixes of the files that decide weights, tokenizer and chat template of a model directory."""


def context_length(path: str) -> int | None:
    """Return the number of positions the model was made for; None if its config does not say."""
    return getattr(model_config(path).get_text_config(), "max_position_embeddings", None)


def fingerprint(path: str) -> str:
    """Return the identity of a file's content, or of a model and tokenizer: a hub commit, or a directory's hash."""
    if os.path.isfile(path):
        return _hash(Path(path))
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return f"{path}@{model_config(path)._commit_hash}"
    files = sorted(p for p in directory.iterdir() if p.suffix in MODEL_FILES)
    return sha256_json({p.name: _hash(p) for p in files})


def _hash(path: Path) -> str:
    """Return the hash of a file; it is read again only if its size or time changed, because weights take seconds."""
    about = path.stat()
    return _hash_of(path, about.st_size, about.st_mtime_ns)


@cache
def _hash_of(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)
