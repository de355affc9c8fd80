"""The sizes of a model, from its config alone, and its FLOPs: its weights are never read.

FLOPs are multiplications and additions of matrices. A matrix takes 2 per number and token in the forward and 4 in the
backward (2 if it is frozen). The head is multiplied with response tokens alone. Mixup adds no matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from sftmix.common.errors import ConfigError
from sftmix.model.adapters import add_adapters
from sftmix.model.layers import decoder_layers
from sftmix.model.meta import empty_model
from sftmix.model.unused import unused_modules
from sftmix.options import LoraOptions
from sftmix.tools.estimate.work import FLOAT
from sftmix.types import Float64

QUANTIZED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per number of a 4-bit layer: 4 bits, an 8-bit scale per 64 numbers, a float32 scale per 256 of those scales."""


class Count(NamedTuple):
    """How many numbers some parameters have: all of them, and those that are trained."""

    all: float
    trained: float


def count(parameters: Iterable[nn.Parameter]) -> Count:
    sizes = [(p.numel(), p.requires_grad) for p in parameters]
    return Count(sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained))


class FakeModel:
    """A causal language model without weights.

    numbers        all numbers; those of a tied weight count once
    layers         numbers of the decoder layers
    outside        numbers of embeddings, last norm and head
    per_token      numbers of the backbone's matrices; embeddings are looked up, not multiplied with
    stored_bytes   bytes of the weights: float32, or 4 bits for a quantised base
    head_shape     V, D
    in_4_bits      the layers whose weights bitsandbytes stores so
    attention_width  numbers of all heads of a layer; 0 for a model without attention
    """

    def __init__(self, path: str | Path, attention: str | None, lora: LoraOptions) -> None:
        """Arguments as model.path, model.attention and model.lora; ConfigError for a model that cannot be built."""
        known = attention if attention in (None, "eager") else "sdpa"
        try:
            self.model = model = empty_model(path, attention=known)
        except (ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ConfigError(f"model.path: cannot build the model of {path}: {error}") from error
        if lora.r:
            add_adapters(model, lora, seed=0)
        elif lora.quantize:  # nothing is trained, and all of it is in 4 bits
            model.requires_grad_(False)
        decoder, head, config = model.get_decoder(), model.get_output_embeddings(), model.config.get_text_config()
        # bitsandbytes stores frozen linear layers in 4 bits, but not the head.
        linear = [one for one in model.modules() if isinstance(one, nn.Linear) and not one.weight.requires_grad]
        self.in_4_bits = [one for one in linear if lora.quantize and one.weight is not head.weight]
        for layer in self.in_4_bits:  # its output has the dtype of its input
            layer.register_forward_hook(lambda layer, inputs, output: output.to(inputs[0].dtype))

        self.numbers = count(model.parameters())
        in_4_bits = sum(layer.weight.numel() for layer in self.in_4_bits)
        self.stored_bytes = FLOAT * (self.numbers.all - in_4_bits) + QUANTIZED_BYTES * in_4_bits
        layers = decoder_layers(model)
        inside = {p for layer in layers for p in layer.parameters()}
        unused = {p for module in unused_modules(model).values() for p in module.parameters()}
        self.n_layers, self.layers = len(layers), count(inside)
        self.outside = count(set(model.parameters()) - inside - unused)
        self.head_shape: tuple[int, int] = tuple(head.weight.shape)
        self.head_is_trained = head.weight.requires_grad
        looked_up = {one.weight for one in decoder.modules() if isinstance(one, nn.Embedding)}
        self.per_token = count(p for p in decoder.parameters() if p.dim() > 1 and p not in looked_up)
        heads = getattr(config, "num_attention_heads", 0)
        self.attention_width = heads and heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def forward_flops(model: FakeModel, amount: Float64) -> tuple[float, float, float]:
    """FLOPs of the backbone's matrices, of attention, and of the head; the amount is that of `amount_of`.

    Attention is the product for the scores and the one with the values: 2 FLOPs each per number of a head and pair of
    positions, of which the causal mask leaves half.
    """
    (vocabulary, width), (tokens, targets, squares) = model.head_shape, amount.tolist()
    attention = 2.0 * model.attention_width * model.n_layers * squares
    return 2.0 * model.per_token.all * tokens, attention, 2.0 * vocabulary * width * targets


def training_flops(model: FakeModel, amount: Float64, *, recompute: bool) -> float:
    """Forward and backward; recompute (activation checkpointing): the forward of the backbone counts twice."""
    matrices, attention, head = forward_flops(model, amount)
    inputs = matrices + 2 * attention + head
    weights = 2.0 * model.per_token.trained * float(amount[0]) + head * model.head_is_trained
    return (matrices + attention) * (2 if recompute else 1) + head + inputs + weights
