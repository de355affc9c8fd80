"""What must be known of a model to say what it costs, from its config alone: its weights are never read.

The model is built of fake tensors, which have shapes and no storage, and a forward of one micro-batch is run on them:
autograd then saves exactly what it would save of the real one, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftmix.adapters import add_adapters
from sftmix.errors import ConfigError
from sftmix.models import model_config
from sftmix.options import LoraOptions
from sftmix.training.layers import decoder_layers

QUANTIZED_BYTES = 0.5625
"""Bytes per frozen number of a 4-bit base model: 4 bits and their scales."""


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
        # On these tensors the attention of GPUs cannot run; sdpa saves as much.
        options = {} if self.attention is None else {"attn_implementation": _traceable(self.attention)}
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, **options)
        except (ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"model.path: cannot build the model of {self.path}: {error}") from error
        if self.lora.r:
            add_adapters(model, self.lora, seed=0)
        with self._mode:
            _on_cpu(model)
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
    def stored_bytes(self) -> float:
        """Bytes of the weights, float32 but for a quantised base."""
        frozen = self.numbers - self.trained
        return 4 * self.trained + frozen * (QUANTIZED_BYTES if self.lora.quantize else 4)

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

    def per_token(self, *, trained: bool = False) -> int:
        """Numbers of the backbone that each token is multiplied with: its matrices, all or those trained."""
        embedding = self.embedding
        found = [p for p in self.model.get_decoder().parameters() if p.dim() > 1 and p is not embedding]
        return sum(p.numel() for p in found if p.requires_grad or not trained)

    @cached_property
    def layers(self) -> list[nn.Module]:
        return decoder_layers(self.model)

    @cached_property
    def largest_layer(self) -> int:
        """Numbers of the largest decoder layer."""
        return max(sum(p.numel() for p in layer.parameters()) for layer in self.layers)

    @cached_property
    def outside_layers(self) -> int:
        """Numbers of embeddings, last norm and head."""
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        return sum(p.numel() for p in self.model.parameters() if id(p) not in inside)

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

    def saved(self, shapes: Sequence[tuple[int, int]], *, bf16: bool, recompute: bool) -> float:
        """Bytes that autograd keeps of the backbone for the backward of one micro-batch.

        shapes     (rows, width) of its segments
        recompute  activation checkpointing: only the inputs of the layers, and all of one layer at a time
        """
        if not recompute:
            return sum(self._traces(tuple(shapes), bf16))
        slots = sum(rows * width for rows, width in shapes)
        inputs = slots * self.head_shape[1] * (2 if bf16 else 4) * len(self.layers)
        return inputs + self.saved_by_a_layer(shapes, bf16=bf16)

    def saved_by_a_layer(self, shapes: Sequence[tuple[int, int]], *, bf16: bool) -> float:
        """Bytes kept of one layer for its largest segment; the backward of the layer makes about as much again."""
        return max(self._traces(tuple(shapes), bf16), default=0.0) / len(self.layers)

    def _traces(self, shapes: tuple[tuple[int, int], ...], bf16: bool) -> list[float]:
        key = (shapes, bf16)
        if key not in self._traced:
            self._traced[key] = [self._trace(rows, width, bf16) for rows, width in shapes]
        return self._traced[key]

    @cached_property
    def _traced(self) -> dict[tuple[tuple[tuple[int, int], ...], bool], list[float]]:
        return {}

    def _trace(self, rows: int, width: int, bf16: bool) -> float:
        kept: dict[int, tuple[float, Any]] = {}
        own = {p.untyped_storage()._cdata for p in self.model.parameters()}

        def keep(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no other gets its place
            return x

        self.model.train()
        with self._mode, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            ids = torch.zeros(rows, width, dtype=torch.int64)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                # held until it is counted: what is freed would be counted twice
                out = self.model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        del out
        return sum(size for size, _ in kept.values())


def _on_cpu(model: nn.Module) -> None:
    """Put tensors of the current (fake) mode in the place of those on the meta device: attention on the CPU chooses
    the kernel that saves as little as those of GPUs, on the meta device it does not."""
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if tensor not in moved:  # a tied one stays one
                empty = torch.empty_like(tensor, device="cpu")
                trained = tensor.requires_grad
                moved[tensor] = nn.Parameter(empty, trained) if isinstance(tensor, nn.Parameter) else empty
            place = module._parameters if name in module._parameters else module._buffers
            place[name] = moved[tensor]  # type: ignore[assignment]


def _traceable(attention: str) -> str:
    return attention if attention in ("sdpa", "eager") else "sdpa"
