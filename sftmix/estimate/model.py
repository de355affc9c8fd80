"""What must be known of a model to say what it costs, from its config alone: its weights are never read.

The model is built of fake tensors, which have shapes and no storage, and a forward of one micro-batch is run on them:
autograd then saves exactly what it would save of the real one, whatever the architecture (`sftmix.estimate.trace`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftmix.common.errors import ConfigError
from sftmix.estimate.trace import Compute, Segment, on_cpu, saved_bytes
from sftmix.model.adapters import add_adapters
from sftmix.model.load import model_config
from sftmix.options import LoraOptions
from sftmix.training.parallel import decoder_layers

QUANTIZED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per number of a 4-bit layer: 4 bits, an 8-bit scale of each 64, a float32 one of each 256 of those."""


@dataclass(frozen=True)
class FakeModel:
    """A causal language model without weights.

    path, attention  as model.path and model.attention
    lora             its adapters (r 0: none)
    """

    path: str | Path
    attention: str | None
    lora: LoraOptions

    @cached_property
    def _mode(self) -> FakeTensorMode:
        return FakeTensorMode(allow_non_fake_inputs=True)

    @cached_property
    def model(self) -> PreTrainedModel:
        config = model_config(self.path)
        # On these tensors the attention of GPUs cannot run; sdpa without a mask saves as much.
        traced = {None: None, "eager": "eager"}.get(self.attention, "sdpa")
        options = {} if traced is None else {"attn_implementation": traced}
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, **options)
        except (ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"model.path: cannot build the model of {self.path}: {error}") from error
        if self.lora.r:
            add_adapters(model, self.lora, seed=0)
        elif self.lora.quantize:  # only read, all of it in 4 bits
            model.requires_grad_(False)
        with self._mode:
            on_cpu(model)
        for layer in _quantizable(model) if self.lora.quantize else []:
            layer.register_forward_hook(_to_dtype_of_input)
        return model

    # ------------------------------------------------------------------------------------------ counts

    @cached_property
    def numbers(self) -> int:
        """All of the model's numbers, a tied one once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def trained(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def quantized(self) -> list[nn.Linear]:
        """The layers in 4 bits."""
        return _quantizable(self.model) if self.lora.quantize else []

    @cached_property
    def stored_bytes(self) -> float:
        """Bytes of the weights, float32 but for a quantised base."""
        in_4_bits = sum(layer.weight.numel() for layer in self.quantized)
        return 4 * (self.numbers - in_4_bits) + QUANTIZED_BYTES * in_4_bits

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()  # type: ignore[return-value]

    @property
    def head_shape(self) -> tuple[int, int]:
        """V, D."""
        rows, width = self.head.weight.shape
        return rows, width

    @property
    def head_is_trained(self) -> bool:
        return any(p.requires_grad for p in self.head.parameters())

    @property
    def embedding(self) -> torch.Tensor:
        weight: Any = self.model.get_input_embeddings().weight
        return weight

    @property
    def is_tied(self) -> bool:
        return self.head.weight is self.embedding

    @cached_property
    def matrices(self) -> list[nn.Parameter]:
        """What tokens are multiplied with in the backbone; embeddings are looked up."""
        modules = [one for one in self.model.get_decoder().modules() if not isinstance(one, nn.Embedding)]
        found = {p: None for one in modules for p in one.parameters(recurse=False) if p.dim() > 1}
        return [p for p in found if p is not self.embedding]

    def per_token(self, *, trained: bool = False) -> float:
        """Numbers of the backbone that each token is multiplied with: its matrices, all or those trained.

        Of experts in one tensor [experts, ...] as many as a token is sent to.
        """
        chosen = getattr(self.model.config.get_text_config(), "num_experts_per_tok", None)
        shares = [min(1.0, chosen / len(p)) if chosen and p.dim() == 3 else 1 for p in self.matrices]
        counted = zip(self.matrices, shares, strict=True)
        return sum(p.numel() * share for p, share in counted if p.requires_grad or not trained)

    @cached_property
    def layers(self) -> list[nn.Module]:
        return decoder_layers(self.model)

    def largest_layer(self, *, trained: bool = False) -> int:
        """Numbers of the largest decoder layer, all or those trained."""
        return max(_count(layer.parameters(), trained) for layer in self.layers)

    def outside_layers(self, *, trained: bool = False) -> int:
        """Numbers of embeddings, last norm and head, all or those trained."""
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        return _count((p for p in self.model.parameters() if id(p) not in inside), trained)

    @cached_property
    def largest_tensor(self) -> int:
        return max(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def attention_width(self) -> int:
        """Heads times head size."""
        config = self.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_attention_heads * size

    # ------------------------------------------------------------------------------------- activations

    def saved(self, segments: Sequence[Segment], compute: Compute, *, recompute: bool) -> float:
        """Bytes that autograd keeps of the backbone for the backward of one micro-batch.

        recompute  activation checkpointing: only the inputs of the layers, and all of one layer at a time
        """
        if not recompute:
            return sum(self._traced(segments, compute))
        size = 2 if compute == "bfloat16" else 4  # autocast leaves float32 between the layers
        inputs = size * sum(one.slots for one in segments) * self.head_shape[1] * len(self.layers)
        # What autocast made of the weights it keeps to the end of the forward, recomputed or not.
        copies = 2 * sum(p.numel() for p in self.matrices if p.requires_grad) if compute == "autocast" else 0
        return inputs + copies + self.saved_by_a_layer(segments, compute)

    def saved_by_a_layer(self, segments: Sequence[Segment], compute: Compute) -> float:
        """Bytes kept of one layer for its largest segment; the backward of the layer makes about as much again."""
        return max(self._traced(segments, compute), default=0.0) / len(self.layers)

    def _traced(self, segments: Sequence[Segment], compute: Compute) -> list[float]:
        """What each segment adds, the largest one first, which shares copies of the weights with the others."""
        key = (tuple(sorted(segments, key=lambda one: -one.slots)), compute)
        if key not in self._traces:
            self._traces[key] = saved_bytes(
                self.model,
                key[0],
                mode=self._mode,
                autocast=compute == "autocast",
                weights=self._weights(compute),
                attention=self.attention or self.model.config._attn_implementation,
            )
        return self._traces[key]

    @cached_property
    def _traces(self) -> dict[tuple[tuple[Segment, ...], Compute], list[float]]:
        return {}

    def _weights(self, compute: Compute) -> dict[str, torch.Tensor]:
        """Parameters of the backbone that are computed in bf16 without autocast: FSDP's all, or those in 4 bits."""
        in_4_bits = {id(layer.weight) for layer in self.quantized}
        named = self.model.get_decoder().named_parameters()
        if compute == "float32":
            return {}
        with self._mode:
            return {
                name: nn.Parameter(torch.empty_like(p, dtype=torch.bfloat16), p.requires_grad)
                for name, p in named
                if compute == "bfloat16" or id(p) in in_4_bits
            }


def _quantizable(model: PreTrainedModel) -> list[nn.Linear]:
    """What bitsandbytes turns into 4 bits: frozen linear layers but the head. All else is loaded as float32."""
    head: Any = model.get_output_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return [layer for layer in linear if not layer.weight.requires_grad and layer.weight is not head.weight]


def _count(parameters: Iterable[nn.Parameter], trained: bool) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def _to_dtype_of_input(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """A hook: what comes out of a 4-bit layer of bitsandbytes has the dtype of what went in."""
    return output.to(inputs[0].dtype)
