"""What must be known of a model to say what it costs, from its config alone: its weights are never read.

The model is built of fake tensors, which have shapes and no storage, and a forward of one micro-batch is run on them:
autograd then saves exactly what it would save of the real one, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AttentionInterface, PreTrainedModel

from sftmix.common.errors import ConfigError
from sftmix.estimate.machine import FLOAT, HALF, Compute
from sftmix.model.adapters import add_adapters
from sftmix.model.meta import empty_model
from sftmix.options import LoraOptions
from sftmix.training.module import attention_inputs
from sftmix.training.parallel import decoder_layers
from sftmix.types import Segment

QUANTIZED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per number of a 4-bit layer: 4 bits, an 8-bit scale of each 64, a float32 one of each 256 of those."""

UNMASKED = "sftmix_sdpa_without_mask"
"""transformers leaves the mask out where it sees that nothing is masked, which it cannot see of fake tensors. To an
implementation without a mask function it gives none."""
AttentionInterface.register(UNMASKED, AttentionInterface()["sdpa"])


class Count(NamedTuple):
    """Numbers in some parameters: in all of them, and in those that are trained."""

    all: float
    trained: float


def count(parameters: Iterable[nn.Parameter], experts: int | None = None) -> Count:
    """experts: as many as a token is sent to count of those in one tensor [experts, ...]."""
    found = [(p.numel() * (min(1.0, experts / len(p)) if experts and p.dim() == 3 else 1), p) for p in parameters]
    return Count(sum(n for n, _ in found), sum(n for n, p in found if p.requires_grad))


class FakeModel:
    """A causal language model without weights.

    numbers        of the model, a tied one once
    outside        of embeddings, last norm and head
    largest_layer  of the largest decoder layer
    per_token      of the backbone that each token is multiplied with: its matrices; embeddings are looked up
    stored_bytes   of the weights: float32, but for a quantised base
    head_shape     V, D
    """

    def __init__(self, path: str | Path, attention: str | None, lora: LoraOptions) -> None:
        """path and attention as model.path and model.attention; lora: its adapters (r 0: none)."""
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = model = _built(path, attention, lora)
        with self._mode:
            _to_cpu(model)
        self._attention = attention or model.config._attn_implementation
        self._traces: dict[Any, list[float]] = {}
        head: Any = model.get_output_embeddings()
        embedding: Any = model.get_input_embeddings()
        # bitsandbytes turns frozen linear layers into 4 bits, but for the head.
        linear = [one for one in model.modules() if isinstance(one, nn.Linear) and not one.weight.requires_grad]
        self._quantized = [one for one in linear if one.weight is not head.weight] if lora.quantize else []
        for layer in self._quantized:  # what comes out of one has the dtype of what went in
            layer.register_forward_hook(lambda layer, inputs, output: output.to(inputs[0].dtype))

        self.numbers = count(model.parameters())
        in_4_bits = sum(layer.weight.numel() for layer in self._quantized)
        self.stored_bytes = FLOAT * (self.numbers.all - in_4_bits) + QUANTIZED_BYTES * in_4_bits
        self.largest_tensor = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
        layers = decoder_layers(model)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        self.n_layers = len(layers)
        self.largest_layer = Count(*map(max, zip(*(count(layer.parameters()) for layer in layers), strict=True)))
        self.outside = count(p for p in model.parameters() if id(p) not in inside)
        self.head_shape: tuple[int, int] = tuple(head.weight.shape)
        self.head_is_trained = any(p.requires_grad for p in head.parameters())
        self.is_tied = head.weight is embedding.weight

        config = model.config.get_text_config()
        modules = [one for one in model.get_decoder().modules() if not isinstance(one, nn.Embedding)]
        found = {p: None for one in modules for p in one.parameters(recurse=False) if p.dim() > 1}
        self._matrices = [p for p in found if p is not embedding.weight]
        self.per_token = count(self._matrices, experts=getattr(config, "num_experts_per_tok", None))
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention_width: int = config.num_attention_heads * size
        self._window: int | None = getattr(config, "sliding_window", None)

    def saved(self, segments: Sequence[Segment], compute: Compute, *, recompute: bool) -> float:
        """Bytes that autograd keeps of the backbone for the backward of one micro-batch.

        recompute  activation checkpointing: only the inputs of the layers, and all of one layer at a time
        """
        if not recompute:
            return sum(self._traced(segments, compute))
        size = HALF if compute == "bfloat16" else FLOAT  # autocast leaves float32 between the layers
        inputs = size * sum(one.input_ids.numel() for one in segments) * self.head_shape[1] * self.n_layers
        # What autocast made of the weights it keeps to the end of the forward, recomputed or not.
        copies = HALF * count(self._matrices).trained if compute == "autocast" else 0
        return inputs + copies + self.saved_by_a_layer(segments, compute)

    def saved_by_a_layer(self, segments: Sequence[Segment], compute: Compute) -> float:
        """Bytes kept of one layer for its largest segment; the backward of the layer makes about as much again."""
        return max(self._traced(segments, compute), default=0.0) / self.n_layers

    def _traced(self, segments: Sequence[Segment], compute: Compute) -> list[float]:
        """What each segment adds, the largest one first, which shares copies of the weights with the others."""
        ordered = sorted(segments, key=lambda one: -one.input_ids.numel())
        kinds = ((x.input_ids.shape, x.position_ids is None, self._implementation(x)) for x in ordered)
        key = (compute, *kinds)
        if key not in self._traces:
            self._traces[key] = self._trace(ordered, compute)
        return self._traces[key]

    def _trace(self, segments: Sequence[Segment], compute: Compute) -> list[float]:
        """Bytes that each segment adds to what the backward needs, the weights left out."""
        decoder: Any = self.model.get_decoder()
        weights = self._weights(compute)
        kept: dict[int, tuple[float, Any]] = {}
        own = {p.untyped_storage()._cdata for p in [*decoder.parameters(), *weights.values()]}

        def keep(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no other gets its place
            return x

        self.model.train()
        added, outputs = list[float](), []  # outputs are held until all is counted: what is freed would count twice
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast"):  # one for all, as in training
            for segment in segments:
                self.model.set_attn_implementation(self._implementation(segment))
                given = {"input_ids": segment.input_ids, **attention_inputs(segment)}
                inputs = {name: x if x is None else self._mode.from_tensor(x) for name, x in given.items()}
                with self._mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                    outputs.append(functional_call(decoder, weights, kwargs={**inputs, "use_cache": False}))
                added.append(sum(size for size, _ in kept.values()) - sum(added))
        return added

    def _implementation(self, segment: Segment) -> str:
        """Attention with the mask that the segment has in training.

        sdpa has none where nothing is padded, packed or beyond the window of a layer; kernels of GPUs never have one.
        """
        slides = self._window is not None and segment.input_ids.shape[1] >= self._window
        masked = segment.position_ids is not None or slides or not segment.attention_mask.all()
        return self._attention if self._attention == "eager" or (self._attention == "sdpa" and masked) else UNMASKED

    def _weights(self, compute: Compute) -> dict[str, torch.Tensor]:
        """Parameters of the backbone that are computed in bf16 without autocast: FSDP's all, or those in 4 bits."""
        if compute == "float32":
            return {}
        in_4_bits = {id(layer.weight) for layer in self._quantized}
        with self._mode:
            return {
                name: nn.Parameter(torch.empty_like(p, dtype=torch.bfloat16), p.requires_grad)
                for name, p in self.model.get_decoder().named_parameters()
                if compute == "bfloat16" or id(p) in in_4_bits
            }


def _built(path: str | Path, attention: str | None, lora: LoraOptions) -> PreTrainedModel:
    """The model on the meta device, with its adapters."""
    # On fake tensors the attention of GPUs cannot run; sdpa without a mask saves as much.
    try:
        model = empty_model(path, attention={None: None, "eager": "eager"}.get(attention, "sdpa"))
    except (ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"model.path: cannot build the model of {path}: {error}") from error
    if lora.r:
        add_adapters(model, lora, seed=0)
    elif lora.quantize:  # only read, all of it in 4 bits
        model.requires_grad_(False)
    return model


def _to_cpu(model: nn.Module) -> None:
    """Put tensors of the current (fake) mode in the place of those on the meta device: attention on the CPU chooses
    the kernel that saves as little as those of GPUs, on the meta device it does not."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False, remove_duplicate=False):
            made = nn.Parameter(torch.empty_like(old, device="cpu"), old.requires_grad)
            setattr(module, name, moved.setdefault(id(old), made))  # a tied one stays one
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
