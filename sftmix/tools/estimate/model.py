"""The sizes of a model, from its config alone: its weights are never read.

A forward of one micro-batch is run on fake tensors, which have shapes and no storage. For these, autograd saves as many
bytes as for real ones, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AttentionInterface

from sftmix.common.errors import ConfigError
from sftmix.model.adapters import add_adapters
from sftmix.model.layers import decoder_layers
from sftmix.model.meta import empty_model
from sftmix.model.unused import unused_modules
from sftmix.options import LoraOptions
from sftmix.tools.estimate.machine import FLOAT, HALF, Compute
from sftmix.training.module import attention_inputs
from sftmix.types import Segment

QUANTIZED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per number of a 4-bit layer: 4 bits, an 8-bit scale per 64 numbers, a float32 scale per 256 of those scales."""

UNMASKED = "sftmix_sdpa_without_mask"
"""sdpa that never gets a mask, as it has no mask function. transformers leaves a mask out if nothing is masked, but it
cannot see that in fake tensors. It saves as much as the kernels of GPUs, which cannot run on these."""
AttentionInterface.register(UNMASKED, AttentionInterface()["sdpa"])

VALUES = (
    "model.path: estimate cannot follow {} ({}): {}. Models whose computation depends on values (experts to which "
    "tokens are routed, rope that grows with the text) have none here. Measure instead: run with "
    "--training.max_steps 2 --checkpoint.every 0, and see peak_memory_bytes and elapsed in its summary.json"
)


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
    largest_layer  numbers of the largest decoder layer
    per_token      numbers of the backbone's matrices; embeddings are looked up, not multiplied with
    stored_bytes   bytes of the weights: float32, or 4 bits for a quantised base
    head_shape     V, D
    attention_width  numbers of all heads of a layer; 0 for a model without attention
    """

    def __init__(self, path: str | Path, attention: str | None, lora: LoraOptions) -> None:
        """Arguments as model.path, model.attention and model.lora; ConfigError for a model that cannot be built."""
        known = attention if attention in (None, "eager") else "sdpa"
        try:
            self.model = model = empty_model(path, attention=known)
        except (ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ConfigError(f"model.path: cannot build the model of {path}: {error}") from error
        self._path, self._attention = path, attention or model.config._attn_implementation
        if lora.r:
            add_adapters(model, lora, seed=0)
        elif lora.quantize:  # nothing is trained, and all of it is in 4 bits
            model.requires_grad_(False)
        decoder, head, config = model.get_decoder(), model.get_output_embeddings(), model.config.get_text_config()
        # bitsandbytes stores frozen linear layers in 4 bits, but not the head.
        linear = [one for one in model.modules() if isinstance(one, nn.Linear) and not one.weight.requires_grad]
        self._in_4_bits = {layer.weight for layer in linear if lora.quantize and layer.weight is not head.weight}
        for layer in linear if lora.quantize else ():  # its output has the dtype of its input
            layer.register_forward_hook(lambda layer, inputs, output: output.to(inputs[0].dtype))

        self.numbers = count(model.parameters())
        in_4_bits = sum(weight.numel() for weight in self._in_4_bits)
        self.stored_bytes = FLOAT * (self.numbers.all - in_4_bits) + QUANTIZED_BYTES * in_4_bits
        layers = decoder_layers(model)
        inside = {p for layer in layers for p in layer.parameters()}
        unused = {p for module in unused_modules(model).values() for p in module.parameters()}
        self.n_layers, self.layers = len(layers), count(inside)
        self.largest_layer = max(count(layer.parameters()) for layer in layers)
        self.outside = count(set(model.parameters()) - inside - unused)
        self.head_shape: tuple[int, int] = tuple(head.weight.shape)
        self.head_is_trained = head.weight.requires_grad
        looked_up = {one.weight for one in decoder.modules() if isinstance(one, nn.Embedding)}
        self.per_token = count(p for p in decoder.parameters() if p.dim() > 1 and p not in looked_up)
        heads = getattr(config, "num_attention_heads", 0)
        self.attention_width = heads and heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)

    def saved(self, segments: Sequence[Segment], compute: Compute, *, recompute: bool) -> tuple[float, float]:
        """Bytes that autograd keeps for the backward of one micro-batch: of the backbone, and of one layer for the
        largest segment. The backward of that layer makes about as much again.

        recompute  activation checkpointing: the inputs of all layers are kept, and everything of one layer at a time
        """
        traced = self._trace(sorted(segments, key=lambda one: -one.input_ids.numel()), compute)
        layer = max(traced, default=0.0) / self.n_layers
        if not recompute:
            return sum(traced), layer
        size = HALF if compute == "bfloat16" else FLOAT  # autocast leaves float32 between the layers
        inputs = size * sum(one.input_ids.numel() for one in segments) * self.head_shape[1] * self.n_layers
        # Autocast keeps its bf16 copies of the weights to the end of the forward, recomputed or not.
        copies = HALF * self.per_token.trained if compute == "autocast" else 0
        return inputs + copies + layer, layer

    def _trace(self, segments: Sequence[Segment], compute: Compute) -> list[float]:
        """Bytes that each segment adds to what autograd keeps, without the weights."""
        fake, decoder = FakeTensorMode(allow_non_fake_inputs=True), self.model.get_decoder()
        weights = dict[str, torch.Tensor]()
        for name, p in decoder.named_parameters():
            # FSDP computes in bf16. So do 4-bit layers under autocast, which casts all other weights itself.
            half = compute == "bfloat16" or (compute == "autocast" and p in self._in_4_bits)
            with fake:
                empty = torch.empty(p.shape, dtype=torch.bfloat16 if half else torch.float32, device="cpu")
            weights[name] = nn.Parameter(empty, p.requires_grad)
        own = {p.untyped_storage()._cdata for p in weights.values()}
        kept: dict[int, Any] = {}  # storages are held, so that no other one gets their address

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage()._cdata not in own:
                kept[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        self.model.train()
        added, outputs = list[float](), []  # outputs are held as well, or freed storages would count twice
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast"):  # one for all, as in training
            for segment in segments:
                # sdpa has a mask if something is padded or packed. Kernels of GPUs never have one.
                masked = segment.position_ids is not None or not segment.attention_mask.all()
                takes = self._attention == "eager" or (self._attention == "sdpa" and masked)
                self.model.set_attn_implementation(self._attention if takes else UNMASKED)
                inputs = {"input_ids": segment.input_ids, **attention_inputs(segment), "use_cache": False}
                with fake, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                    try:
                        outputs.append(functional_call(decoder, weights, kwargs=inputs))
                    except RuntimeError as error:
                        message = VALUES.format(type(self.model).__name__, self._path, str(error).split("\n")[0])
                        raise ConfigError(message) from error
                added.append(sum(storage.nbytes() for storage in kept.values()) - sum(added))
        return added
