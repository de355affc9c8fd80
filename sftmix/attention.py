"""Whether a model keeps packed documents apart, measured on the model itself (T12).

transformers builds block-diagonal causal masks from position ids that start again, where it is given no attention mask
and the attention is one it builds masks for. What an architecture makes of it decides: a probe batch is compared with
its documents one at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from sftmix.errors import ConfigError

_DOCUMENTS = ((9, 6, 8), (5, 7), (13,))
"""Lengths of the documents packed into each line of the probe, padded to the longest."""


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """ConfigError unless the backbone gives every packed document the hidden states it has alone."""
    name = f"{type(model).__name__} ({model.config.model_type}, attention {model.config._attn_implementation})"
    training = model.training
    model.eval()
    try:
        difference, size = _probe(model)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(f"model.path: {name} does not take packed documents: {error}. {_REMEDY}") from error
    finally:
        model.train(training)
    limit = {torch.float64: 1e-9, torch.float32: 1e-4}.get(model.dtype, 3e-2) * size
    if not difference <= limit:
        raise ConfigError(
            f"model.path: {name} does not keep packed documents apart: their hidden states differ by up to "
            f"{difference:.3g} from those of each document alone (allowed: {limit:.3g}). {_REMEDY}"
        )


_REMEDY = (
    "Set data.packing to false (each example is a piece of one document), or another model.attention (sdpa, eager)."
)


def _probe(model: PreTrainedModel) -> tuple[float, float]:
    """(largest difference of a hidden state, largest hidden state) of a packed batch and its documents alone."""
    decoder, device = model.get_decoder(), model.device
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    width = max(sum(lengths) for lengths in _DOCUMENTS)
    ids = (torch.arange(len(_DOCUMENTS) * width, device=device) * 7919 % vocabulary).view(-1, width)
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in (*lengths, width - sum(lengths))]) for lengths in _DOCUMENTS]
    ).to(device)
    packed = decoder(input_ids=ids, attention_mask=None, position_ids=positions, use_cache=False).last_hidden_state
    difference, size = 0.0, 0.0
    for line, lengths in enumerate(_DOCUMENTS):
        start = 0
        for length in lengths:
            one = ids[line : line + 1, start : start + length]
            alone = decoder(input_ids=one, attention_mask=torch.ones_like(one), use_cache=False).last_hidden_state[0]
            difference = max(difference, float((packed[line, start : start + length] - alone).abs().max()))
            size = max(size, float(alone.abs().max()))
            start += length
    return difference, size
