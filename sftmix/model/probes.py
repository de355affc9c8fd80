"""Probes of a model beside its training: its logits, its positions, and how others read its export."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import get_max_memory
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sftmix.model.load import apart, model_config, probe_ids, probing
from sftmix.model.packing import attending
from sftmix.words.progress import without_bars_of_transformers

TEXTS = (
    "cafe\u0301 \u00c5ngstro\u0308m",
    "1234567 1,000.50",
    "  two\n\n\tblanks ",
    "\u4e2d\u6587 \u65e5\u672c",
    "\U0001f44d\U0001f3fd",
)
"""What tokenizers treat in unlike ways: accents that combine, digits, blanks, ideographs, emoji."""


def probe_logits(model: Any) -> Tensor:
    """Return the logits [2, 16, V] of a probe, in eval mode and without gradients; ConfigError if the model fails."""
    eager = torch.compiler.set_stance("force_eager")  # and the attention that every model has
    with probing(model, f"{type(model).__name__} does not run"), attending(model, "eager"), eager:
        return model(input_ids=probe_ids(model, 2, 16), use_cache=False).logits


def context_length(config: PretrainedConfig) -> int | None:
    """Return the number of positions that a model was made for, with YaRN's; None if its config does not say."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    length = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # the latter is MPT's
    if rope.get("rope_type") == "yarn":  # Qwen 2.5: 4.0 * 32768 = 131072, where max_position_embeddings is 32768
        length = max(length, round(rope["factor"] * rope["original_max_position_embeddings"]))
    return length


def position_border(config: PretrainedConfig) -> int:
    """Return the length beyond which a row changes the positions of all rows in its batch: LongRoPE, dynamic RoPE."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return sys.maxsize
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings  # Phi-3-mini-128k: 4096


# ------------------------------------------------------------------------------------------------- exports


def export_problems(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, base: str) -> Iterator[str]:
    """Yield how others would read another tokenizer or model from an exported directory than the run has.

    base  the model onto which adapters are loaded; empty for a whole model, which is read by the class that its
          config.json names, with its values if memory has room for them and no rank has shards alone
    """
    try:
        read = AutoTokenizer.from_pretrained(path)
        if any(read(text)["input_ids"] != tokenizer(text)["input_ids"] for text in TEXTS):
            yield (
                f"AutoTokenizer takes {type(read).__name__} for this type of model, which makes other tokens than "
                "tokenizer.json: give pipelines and servers PreTrainedTokenizerFast.from_pretrained(DIRECTORY)"
            )
        config = model_config(base or path)
        # Qwen 3.5: Qwen3_5ForConditionalGeneration, where AutoModelForCausalLM takes Qwen3_5ForCausalLM
        kind = getattr(transformers, (config.architectures or [""])[0], type(model))
        if not base and (problem := _unlike(model, kind, path)):
            yield f"{kind.__name__}, which config.json names, reads another model from it: {problem:.200}"
        elif base and type(model) is not kind and (problem := _homeless(model, kind, config)):
            yield (
                f"these are adapters of {type(model).__name__}, which AutoModelForCausalLM loads, and {kind.__name__}, "
                f"which config.json of the base model names, {problem}: a server that loads it leaves out adapters "
                "that have no module of their name there, without a word. Export with --merge for it"
            )
    except Exception as error:  # no training ends for the sake of what others do
        yield f"it cannot be read as its files say: {error}"


def _homeless(model: PreTrainedModel, kind: Any, config: PretrainedConfig) -> str:
    """Return which modules with adapters a model of another class lacks, or that they cannot be compared; else ""."""
    try:
        with torch.device("meta"):
            there = {name for name, _ in kind._from_config(config).named_modules()}
    except Exception as error:  # its configuration may be of another kind
        return f"cannot be made from it to compare their names ({error})"
    trained = [
        n for n, part in model.named_modules() if hasattr(part, "base_layer") or hasattr(part, "modules_to_save")
    ]
    # two tensors of experts have one layer around the other: mlp.experts and mlp.experts.base_layer
    lost = [name for name in trained if ".base_layer" not in name and name not in there]
    return f"lacks {len(lost)} of their modules, such as {lost[0]}" if lost else ""


def _unlike(model: PreTrainedModel, kind: Any, path: Path) -> str:
    """Return what differs in the model that a class reads from a directory; nothing if nothing does."""
    sharded = isinstance(next(model.parameters()), DTensor)
    place = "meta" if sharded or get_max_memory()["cpu"] < 8 * model.num_parameters() else None
    with without_bars_of_transformers():
        read, info = kind.from_pretrained(path, dtype=torch.float32, device_map=place, output_loading_info=True)
    if names := info["missing_keys"] or info["unexpected_keys"]:
        return str(names)
    return "" if place else apart(probe_logits(read), probe_logits(model).cpu())
