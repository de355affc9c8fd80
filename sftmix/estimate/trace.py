"""What autograd keeps of a forward of the backbone, found by running it on fake tensors, which have no storage."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AttentionInterface, PreTrainedModel

Compute = Literal["float32", "autocast", "bfloat16"]
"""float32; bf16 autocast over float32 weights; or bf16 weights (FSDP's policy), with which all is bf16."""

UNMASKED = "sftmix_sdpa_without_mask"


@dataclass(frozen=True, order=True, slots=True)
class Segment:
    """One pass of a micro-batch through the backbone: `rows` lines of `width` tokens.

    full    every line is one document without padding
    padded  some line is shorter: the attention needs a mask
    packed  some line holds several documents, told apart by their positions
    """

    rows: int
    width: int
    content: Literal["full", "padded", "packed"] = "full"

    @property
    def slots(self) -> int:
        return self.rows * self.width

    def inputs(self) -> dict[str, Any]:
        """Arguments of a backbone that is fed such lines."""
        ids = torch.zeros(self.rows, self.width, dtype=torch.int64)
        mask = torch.ones_like(ids)
        if self.content == "packed":
            positions = torch.arange(self.width).expand(self.rows, -1).clone()
            positions[:, -1] = 0
            return {"input_ids": ids, "attention_mask": None, "position_ids": positions}
        if self.content == "padded":
            mask[0, -1] = 0
        return {"input_ids": ids, "attention_mask": mask}


def saved_bytes(
    model: PreTrainedModel,
    segments: Sequence[Segment],
    *,
    mode: FakeTensorMode,
    autocast: bool,
    weights: Mapping[str, torch.Tensor],
    attention: str,
) -> list[float]:
    """Bytes that each segment adds to what the backward needs, the weights left out; in one autocast, as in training.

    model      of fake tensors of `mode`
    weights    parameters of its backbone, by name, that take the place of its own
    attention  eager, sdpa, or a kernel that needs no mask for any content
    """
    decoder: Any = model.get_decoder()
    kept: dict[int, tuple[float, Any]] = {}
    own = {p.untyped_storage()._cdata for p in [*decoder.parameters(), *weights.values()]}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no other gets its place
        return x

    model.train()
    sums, outputs = [0.0], []  # outputs are held until all is counted: what is freed would be counted twice
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for segment in segments:
            with _attention(model, attention, segment), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                inputs = {**segment.inputs(), "use_cache": False}
                outputs.append(functional_call(decoder, dict(weights), kwargs=inputs))
            sums.append(sum(size for size, _ in kept.values()))
    return [after - before for before, after in itertools.pairwise(sums)]


@contextlib.contextmanager
def _attention(model: PreTrainedModel, attention: str, segment: Segment) -> Iterator[None]:
    """Attention with the mask that the segment has in training.

    transformers leaves the mask out where it sees that nothing is masked, which it cannot see of fake tensors. To an
    implementation without a mask function it gives none.
    """
    if attention == "eager" or (attention == "sdpa" and (segment.content != "full" or _slides(model, segment.width))):
        yield
        return
    before = model.config._attn_implementation
    AttentionInterface.register(UNMASKED, AttentionInterface()["sdpa"])
    model.set_attn_implementation(UNMASKED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _slides(model: PreTrainedModel, width: int) -> bool:
    """Whether some layer attends to a window that is no longer than the line: that is a mask, too."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return window is not None and width >= window


def on_cpu(model: nn.Module) -> None:
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
