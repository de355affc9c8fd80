"""Probes of what is done with a model beside its training: answers in batches, merged adapters, and exports."""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from sftmix.model.load import ROUNDING, probe_ids, probing


def apart(ours: Tensor, theirs: Tensor) -> str:
    """Return by how much two computations of the same numbers differ, if rounding does not explain it; else nothing."""
    difference = float((ours - theirs).abs().max())
    limit = ROUNDING.get(theirs.dtype, 3e-2) * float(theirs.abs().max())
    return "" if difference <= limit else f"by up to {difference:.3g} (allowed: {limit:.3g})"


def probe_logits(model: Any) -> Tensor:
    """Return the logits [2, 16, V] of a probe, in eval mode and without gradients; ConfigError if the model fails."""
    with probing(model, f"{type(model).__name__} does not run"):
        return model(input_ids=probe_ids(model, 2, 16), use_cache=False).logits


def position_border(config: PretrainedConfig) -> int:
    """Return the length beyond which a row changes the positions of all rows in its batch: LongRoPE, dynamic RoPE."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return sys.maxsize
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


def longest_together(model: Any) -> int:
    """Return the length of rows up to which a batch changes no answer; 0 if shorter prompts must not be padded.

    A recurrent state, a convolution or a window of compressed tokens may see padding on the left: a prompt is continued
    beside a longer one, and alone.
    """
    ids, pad = probe_ids(model, 2, 12), 7
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    options = GenerationConfig(max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with probing(model, f"{type(model).__name__} does not generate"):
        beside = model.generate(ids, attention_mask=mask, generation_config=options)
        alone = model.generate(ids[1:, pad:], attention_mask=mask[1:, pad:], generation_config=options)
    return 0 if apart(beside.logits[-1][-1], alone.logits[-1][-1]) else position_border(model.config)
