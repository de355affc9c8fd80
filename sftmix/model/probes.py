"""Probes of a model beside its training: its logits, its positions, and how others read its export."""

import copy
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import get_max_memory
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sftmix.model.adapters import adapted_kinds, in_peft_format
from sftmix.model.compared import apart, probe_ids, probing, some
from sftmix.model.head import ADAPTER, adapter_config
from sftmix.model.load import model_config, without_tables
from sftmix.model.packing import attending

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
    eager = torch.compiler.set_stance("force_eager")  # and below the attention that every model has
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


# ------------------------------------------------------------------------------------------------ adapters

UNTRAINED = 0.2
"""Distance from the mean row below which a row looks untrained, relative to the median row's."""


def before_adapters(model: PreTrainedModel, base: str, ends: Sequence[tuple[int, str]]) -> Iterator[str]:
    """Yield what to know before adapters are trained: where they are, what cannot read them, what they cannot mend.

    ends  ids and tokens that end answers
    """
    yield adapted_kinds(model)
    yield from adapters_left_out(model, base)
    head: Any = model.get_output_embeddings()
    if any(p.requires_grad for p in head.parameters()):
        return
    rows = untrained_rows(head.weight, [row for row, _ in ends])
    if untrained := [token for row, token in ends if row in rows]:
        yield (
            f"model.path: the LM head's rows of {', '.join(untrained)}, which end answers, look untrained beside the "
            "others, and adapters elsewhere cannot mend them, so answers may not end: train the head as well "
            "(model.lora.modules_to_save '[lm_head]'), or take another template (data.template)"
        )


def untrained_rows(weight: Tensor, rows: Sequence[int]) -> list[int]:
    """Return those rows of [V, D] that are almost the mean of all, or there twice, as reserved and added tokens'."""
    mean = weight.mean(0, dtype=torch.float32)
    least = UNTRAINED * (weight[:: max(1, len(weight) // 4096)] - mean).norm(dim=1).median()

    def twice(row: int) -> bool:
        same = weight[weight[:, 0] == weight[row, 0]] == weight[row]  # [few, D]
        return int(same.all(1).sum()) > 1

    return [row for row in rows if (weight[row] - mean).norm() < least or twice(row)]


# ------------------------------------------------------------------------------------------------- exports


def export_problems(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterator[str]:
    """Yield how others would read another tokenizer or model from an exported directory than the run has."""
    try:
        read = AutoTokenizer.from_pretrained(path)
        if any(read(text)["input_ids"] != tokenizer(text)["input_ids"] for text in TEXTS):
            yield (
                f"AutoTokenizer takes {type(read).__name__} for this type of model, which makes other tokens than "
                "tokenizer.json: give pipelines and servers PreTrainedTokenizerFast.from_pretrained(DIRECTORY)"
            )
        if problem := _unlike(model, path):
            yield f"AutoModelForCausalLM reads another model from it: {problem:.200}"
    except Exception as error:  # no training ends for the sake of what others do
        yield f"it cannot be read as its files say: {error}"


def adapters_left_out(model: PreTrainedModel, base: str) -> Iterator[str]:
    """Yield who leaves out adapters for their names or shapes: transformers or PEFT, or the class that the base names.

    These are known before the adapters are trained; their values are not looked at.
    """
    adapters = in_peft_format(model, dict(model.named_parameters()))
    state = {name: torch.empty_like(x, device="meta") for name, x in adapters.items()}
    config = model_config(base)
    named: Any = getattr(transformers, (config.architectures or [""])[0], type(model))  # which transformers may lack
    for kind in dict.fromkeys((type(model), named)):  # Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration
        for reader, reads in _READERS.items():
            try:
                with without_tables(), warnings.catch_warnings(action="ignore"):
                    with torch.device("meta"):
                        there = kind._from_config(config if kind is named else model.config)
                    left = reads(there, copy.deepcopy(adapter_config(model)), state)
                problem = left and f"leaves out {some(left)} of them, without a word"
            except Exception as error:  # its configuration may be of another kind
                problem = f"cannot read them: {error!s:.200}"
            if problem:
                yield (
                    f"these are adapters of {type(model).__name__}, and {reader} on {kind.__name__} {problem}: export "
                    "with --merge for it"
                )


def _by_transformers(there: Any, config: Any, adapters: dict[str, Tensor]) -> Collection[str]:
    """Return the names of adapters without a place in a model, or else of places without adapters."""
    info = there.load_adapter(peft_config=config, adapter_state_dict=adapters, adapter_name=ADAPTER)
    return info.unexpected_keys or info.missing_keys


def _by_peft(there: Any, config: Any, adapters: dict[str, Tensor]) -> Collection[str]:
    from peft import PeftModel, set_peft_model_state_dict

    wrapped = PeftModel(there, config)
    missing, unexpected = set_peft_model_state_dict(wrapped, adapters, ADAPTER)  # type: ignore[attr-defined]
    return unexpected or [name for name, p in wrapped.named_parameters() if p.requires_grad and name in missing]


_READERS = {"transformers": _by_transformers, "PEFT": _by_peft}


def _unlike(model: PreTrainedModel, path: Path) -> str:
    """Return what differs in the model that transformers reads from a directory; nothing if nothing does.

    By its values if memory has room for them, no rank has shards alone and the base is not quantised; else by names.
    """
    by_names = isinstance(next(model.parameters()), DTensor) or hasattr(model, "hf_quantizer")
    place = "meta" if by_names or get_max_memory()["cpu"] < 8 * model.num_parameters() else None
    with without_tables(), warnings.catch_warnings(action="ignore"):  # PEFT warns of ranks that it has given itself
        options: Any = {"dtype": torch.float32, "device_map": place, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
        read, info = loaded
    if names := info["missing_keys"] or info["unexpected_keys"]:
        return str(names)
    if place:
        return ""
    half = torch.bfloat16 if any(p.dtype == torch.bfloat16 for p in model.parameters()) else None  # of a frozen base
    on_cpu, own = (torch.autocast(device, half, enabled=bool(half)) for device in ("cpu", model.device.type))
    with on_cpu, own:
        return apart(probe_logits(read), probe_logits(model).cpu(), half)
