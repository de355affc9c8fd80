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
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel

from sftmix.common.errors import ConfigError
from sftmix.model.adapters import add_adapters
from sftmix.model.meta import empty_model
from sftmix.model.unused import unused_modules
from sftmix.options import LoraOptions
from sftmix.tools.estimate.machine import FLOAT, HALF, Compute
from sftmix.training.module import attention_inputs
from sftmix.training.parallel import decoder_layers
from sftmix.types import Segment

QUANTIZED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per number of a 4-bit layer: 4 bits, an 8-bit scale per 64 numbers, a float32 scale per 256 of those scales."""

UNMASKED = "sftmix_sdpa_without_mask"
"""sdpa that never gets a mask, as it has no mask function. transformers leaves a mask out if nothing is masked, but it
cannot see that in fake tensors."""
AttentionInterface.register(UNMASKED, AttentionInterface()["sdpa"])


VALUES = (
    "model.path: estimate cannot follow {} ({}), because what it computes depends on values, and it has none here: "
    "experts to which tokens are routed, rope that grows with the text. Measure instead: run with "
    "--training.max_steps 2 --checkpoint.every 0, and see peak_memory_bytes and elapsed in its summary.json"
)


class Count(NamedTuple):
    """How many numbers some parameters have: all of them, and those that are trained."""

    all: float
    trained: float


def count(parameters: Iterable[nn.Parameter], experts: int | None = None) -> Count:
    """Count the numbers; of a tensor [experts, ...], those of as many experts as a token is sent to."""
    found = [(p.numel() * (min(1.0, experts / len(p)) if experts and p.dim() == 3 else 1), p) for p in parameters]
    return Count(sum(n for n, _ in found), sum(n for n, p in found if p.requires_grad))


class FakeModel:
    """A causal language model without weights.

    numbers        all numbers; those of a tied weight count once
    layers         numbers of the decoder layers
    outside        numbers of embeddings, last norm and head
    largest_layer  numbers of the largest decoder layer
    per_token      numbers of the backbone's matrices; embeddings are looked up, not multiplied with
    stored_bytes   bytes of the weights: float32, or 4 bits for a quantised base
    head_shape     V, D
    attention_width  numbers of all heads of a layer, the mean of queries and values
    """

    def __init__(self, path: str | Path, attention: str | None, lora: LoraOptions) -> None:
        """Arguments as model.path, model.attention and model.lora; ConfigError for a model that cannot be built."""
        self._path = path
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = model = _built(path, attention, lora)
        self._attention = attention or model.config._attn_implementation
        self._traces: dict[Any, list[float]] = {}
        head: Any = model.get_output_embeddings()
        embedding: Any = model.get_input_embeddings()
        # bitsandbytes stores frozen linear layers in 4 bits, but not the head.
        linear = [one for one in model.modules() if isinstance(one, nn.Linear) and not one.weight.requires_grad]
        self._quantized = [one for one in linear if one.weight is not head.weight] if lora.quantize else []
        for layer in self._quantized:  # its output has the dtype of its input
            layer.register_forward_hook(lambda layer, inputs, output: output.to(inputs[0].dtype))

        self.numbers = count(model.parameters())
        in_4_bits = sum(layer.weight.numel() for layer in self._quantized)
        self.stored_bytes = FLOAT * (self.numbers.all - in_4_bits) + QUANTIZED_BYTES * in_4_bits
        self.largest_tensor = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
        layers = decoder_layers(model)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        self.n_layers = len(layers)
        self.largest_layer = Count(*map(max, zip(*(count(layer.parameters()) for layer in layers), strict=True)))
        self.layers = count(p for p in model.parameters() if id(p) in inside)
        unused = {id(p) for module in unused_modules(model).values() for p in module.parameters()}
        self.outside = count(p for p in model.parameters() if id(p) not in inside | unused)
        self.head_shape: tuple[int, int] = tuple(head.weight.shape)
        self.head_is_trained = any(p.requires_grad for p in head.parameters())
        self.is_tied = head.weight is embedding.weight

        config = model.config.get_text_config()
        looked_up = {one.weight for one in model.get_decoder().modules() if isinstance(one, nn.Embedding)}
        self._matrices = [p for p in model.get_decoder().parameters() if p.dim() > 1 and p not in looked_up]
        self.per_token = count(self._matrices, experts=getattr(config, "num_experts_per_tok", None))
        self.attention_width = _attention_width(config)
        self._window: int | None = getattr(config, "sliding_window", None)

    def saved(self, segments: Sequence[Segment], compute: Compute, *, recompute: bool) -> tuple[float, float]:
        """Bytes that autograd keeps for the backward of one micro-batch: of the backbone, and of one layer for the
        largest segment. The backward of that layer makes about as much again.

        recompute  activation checkpointing: the inputs of all layers are kept, and everything of one layer at a time
        """
        ordered = sorted(segments, key=lambda one: -one.input_ids.numel())
        key = (compute, *((one.input_ids.shape, one.position_ids is None, self._kernel(one)) for one in ordered))
        if key not in self._traces:
            self._traces[key] = self._trace(ordered, compute)
        layer = max(self._traces[key], default=0.0) / self.n_layers
        if not recompute:
            return sum(self._traces[key]), layer
        size = HALF if compute == "bfloat16" else FLOAT  # autocast leaves float32 between the layers
        inputs = size * sum(one.input_ids.numel() for one in segments) * self.head_shape[1] * self.n_layers
        # Autocast keeps its bf16 copies of the weights to the end of the forward, recomputed or not.
        copies = HALF * count(self._matrices).trained if compute == "autocast" else 0
        return inputs + copies + layer, layer

    def _trace(self, segments: Sequence[Segment], compute: Compute) -> list[float]:
        """Bytes that each segment adds to what autograd keeps, without the weights."""
        decoder: Any = self.model.get_decoder()
        weights = self._weights(compute)
        kept: dict[int, tuple[float, Any]] = {}
        own = {p.untyped_storage()._cdata for p in weights.values()}

        def keep(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), storage)  # is held, so that no other one gets its address
            return x

        self.model.train()
        added, outputs = list[float](), []  # outputs are held as well, or freed storages would count twice
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast"):  # one for all, as in training
            for segment in segments:
                self.model.set_attn_implementation(self._kernel(segment))
                inputs = {"input_ids": segment.input_ids, **attention_inputs(segment), "use_cache": False}
                with self._mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                    try:
                        outputs.append(functional_call(decoder, weights, kwargs=inputs))
                    except RuntimeError as error:
                        raise ConfigError(VALUES.format(type(self.model).__name__, self._path)) from error
                added.append(sum(size for size, _ in kept.values()) - sum(added))
        return added

    def _kernel(self, segment: Segment) -> str:
        """The attention, with a mask if it has one for this segment in training.

        sdpa has one if something is padded, packed or outside the window of a layer. Kernels of GPUs never have one.
        """
        slides = self._window is not None and segment.input_ids.shape[1] >= self._window
        masked = segment.position_ids is not None or slides or not segment.attention_mask.all()
        return self._attention if self._attention == "eager" or (self._attention == "sdpa" and masked) else UNMASKED

    def _weights(self, compute: Compute) -> dict[str, torch.Tensor]:
        """Fake parameters of the backbone, in the dtype that it computes in, in place of those on the meta device.

        FSDP computes in bf16. So do 4-bit layers under autocast, which casts all other weights itself.
        """
        in_4_bits = {id(layer.weight) for layer in self._quantized}
        weights = dict[str, torch.Tensor]()
        for name, p in self.model.get_decoder().named_parameters():
            half = compute == "bfloat16" or (compute == "autocast" and id(p) in in_4_bits)
            with self._mode:
                made = torch.empty_like(p, dtype=torch.bfloat16 if half else p.dtype, device="cpu")
            weights[name] = nn.Parameter(made, p.requires_grad)
        return weights


def _attention_width(config: Any) -> float:
    """Return 0 for a model without attention, and the mean where layers have heads of several sizes."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0.0
    layers, widths = getattr(config, "per_layer_config", None) or [config], 0.0
    for layer in layers:
        usual = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        queries, values = getattr(layer, "qk_head_dim", None), getattr(layer, "v_head_dim", None)
        # Where queries and values differ (DeepSeek), head_dim is another thing.
        widths += heads * ((queries + values) / 2 if queries and values else usual)
    return widths / len(layers)


def _built(path: str | Path, attention: str | None, lora: LoraOptions) -> PreTrainedModel:
    """The model on the meta device, with its adapters."""
    # The kernels of GPUs cannot run on fake tensors. sdpa without a mask saves as much.
    try:
        with _WithoutValues():
            model = empty_model(path, attention={None: None, "eager": "eager"}.get(attention, "sdpa"))
    except (ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"model.path: cannot build the model of {path}: {error}") from error
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
    if lora.r:
        add_adapters(model, lora, seed=0)
    elif lora.quantize:  # nothing is trained, and all of it is in 4 bits
        model.requires_grad_(False)
    return model


class _WithoutValues(TorchFunctionMode):
    """Make tensors without values on the meta device at once: that of a layer's experts may be larger than memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)
