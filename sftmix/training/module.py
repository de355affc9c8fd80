"""Model and losses in one forward, in the module that DDP and FSDP wrap.

Using the LM head outside the wrapped forward would skip DDP's hooks and see sharded weights under FSDP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sftmix.components.view import LossView, Taught
from sftmix.functional import SFTLoss
from sftmix.model.experts import cast_experts
from sftmix.model.head import head_of
from sftmix.model.layers import decoder_layers
from sftmix.model.packing import attention_of, cudnn_attention, is_flash, known_rows
from sftmix.model.varlen import VARLEN
from sftmix.types import Batch, Plan, Segment
from sftmix.words.errors import ConfigError

Perturb = Callable[..., torch.Tensor]
"""`Perturbation.embeddings` with seed and step filled in: (e, mask, ids=...) -> e."""


class TrainingModule(nn.Module):
    """A causal language model whose forward returns the fused NTP + Mixup loss of one micro-batch.

    padding_free  True if the examples of a micro-batch share one row; before it is set to True,
                  `sftmix.model.packing.packing_problem` must have found no problem
    """

    def __init__(self, model: PreTrainedModel, *, chunk_size: int | None = None) -> None:
        super().__init__()
        cast_experts(model)
        self.padding_free = False
        self.model = model
        self.head = head_of(model)
        self.chunk_size = chunk_size

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Return hidden[T, D], the input of the LM head at the positions that predict the response tokens."""
        return self.token_states(batch)[: len(batch.labels)]

    def token_states(self, batch: Batch, perturb: Perturb | None = None) -> torch.Tensor:
        """Return hidden[T + Q, D]: behind the states of `hidden_states` those that predict the prompts' tokens."""
        decoder = self.model.get_decoder()
        parts = []
        order = []
        attention = attention_of(self.model)
        for segment in batch.segments:
            changing: Any = contextlib.nullcontext()
            if perturb is not None and segment.slots:  # not an idle segment
                # The decoder still gets the ids, as some have more embeddings by layer.
                ids = [batch.ids[slot] for slot in segment.slots]
                change = partial(_perturbed, segment, partial(perturb, ids=ids))
                changing = self.model.get_input_embeddings().register_forward_hook(change)
            with changing, known_rows(packed=segment.position_ids is not None):
                inputs = attention_inputs(segment, attention, masked=segment.input_ids.is_cpu)
                out = decoder(input_ids=segment.input_ids, **inputs, use_cache=False)
            parts.append(out.last_hidden_state.flatten(0, 1).index_select(0, segment.index))  # [b, l, D] -> [t, D]
            order.append(segment.order)
        return torch.cat(parts).index_select(0, torch.argsort(torch.cat(order)))  # order 5 3 4 0 1 2: rows 3 4 5 1 2 0

    def forward(
        self,
        batch: Batch,
        plan: Plan,
        *,
        perturb: Perturb | None = None,
        loss: Callable[[LossView, Batch, Plan], SFTLoss] | None = None,
        teacher: Taught | None = None,
    ) -> SFTLoss:
        """Return the loss of `plan`, whose weights are already divided by the global counts.

        perturb  a training step's change of the input embeddings; None in scoring
        loss     `Objective.loss`; None: the fused loss, as in scoring
        teacher  the teacher's states of the micro-batch, if the objective needs them
        """
        rows = len(batch.labels) if batch and batch.prompt else None  # DDP is tried without a batch
        view = ModelView(self, lambda: self.token_states(batch, perturb), rows=rows, teacher=teacher)
        return view.sft_loss(batch, plan) if loss is None else loss(view, batch, plan)

    def read(self, function: Callable[[TrainingModule], Any]) -> Any:
        """Return `function(module)`; `wrap` makes this call a forward for FSDP as well, so it sees whole weights."""
        return function(self)


class ModelView(LossView):
    """A view for one micro-batch in training; see `LossView`."""

    def __init__(self, module: TrainingModule, hidden: Callable[[], torch.Tensor], **more: Any) -> None:
        super().__init__(module.head, hidden, chunk_size=module.chunk_size, **more)
        self._model = module.model

    def states(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        *,
        layer: int | None = None,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        taken = list[torch.Tensor]()
        if change is None and layer is not None:
            change = partial(_taking, taken)
        mask, positions = mask.long(), mask.cumsum(1).sub(1).clamp(min=0)  # mask 1 1 0 -> positions 0 1 1
        changing: Any = contextlib.nullcontext()
        if change is not None:

            def changed(module, inputs, output):
                if isinstance(output, tuple):  # some versions of transformers return one, with the states first
                    return (changed(module, inputs, output[0]), *output[1:])
                if output.shape[:-1] != input_ids.shape:  # AltUp, hyper-connections: rows would not be examples
                    raise ConfigError(
                        f"{type(self._model).__name__} keeps several states of each token between its layers "
                        f"({list(output.shape)} after layer {layer}), and this objective takes one: take "
                        "the embeddings (layer 0), or use another objective"
                    )
                return change(output)

            changing = self._after(layer or 0).register_forward_hook(changed)
        # The decoder gets the ids, not embeddings, to which some families do more (see `token_states`). The rows are
        # padded, also if those of the other passes are not.
        with changing, known_rows(packed=False), cudnn_attention(False):
            inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
            out = self._model.get_decoder()(input_ids=input_ids, **inputs).last_hidden_state
        return taken[0] if taken else out

    @property
    def layers(self) -> int:
        return len(decoder_layers(self._model))

    def _after(self, layer: int) -> nn.Module:
        """Return the module behind which states are changed: the input embeddings (0), or a decoder layer."""
        if layer == 0:
            return self._model.get_input_embeddings()
        layers = decoder_layers(self._model)
        if not 1 <= layer <= len(layers):
            raise ConfigError(f"no decoder layer {layer}; allowed: 1 to {len(layers)}, and 0, the embeddings")
        # If activations are recomputed, the backward would make the layer's forward without the hook.
        if any(getattr(part, "gradient_checkpointing", False) for part in self._model.modules()):
            raise ConfigError(
                f"training.activation_checkpointing true and states after layer {layer} exclude each other: set it to "
                "false, or take the embeddings (layer 0)"
            )
        return layers[layer - 1]


def _taking(taken: list[torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """Keep the states, and return them as they are."""
    taken.append(states)
    return states


def _perturbed(segment: Segment, perturb: Perturb, module: nn.Module, inputs: object, e: torch.Tensor) -> torch.Tensor:
    """Return the changed embeddings of a segment; examples that share a row are perturbed as padded ones."""
    if segment.lengths is None:
        return perturb(e, segment.attention_mask)
    # [1, l, D] -> [B, longest, D], [1, l] -> [B, longest]
    padded, mask = (
        pad_sequence(line[0].split(segment.lengths), batch_first=True) for line in (e, segment.attention_mask)
    )
    lines = zip(perturb(padded, mask), segment.lengths, strict=True)
    return torch.cat([line[:length] for line, length in lines])[None]  # [1, l, D]


def attention_inputs(segment: Segment, attention: str = "", *, masked: bool = True) -> dict[str, Any]:
    """Return the backbone inputs that say who attends to whom: the mask of real tokens, or packed positions.

    transformers keeps documents apart by their positions only if it gets no mask.

    attention  its name: varlen gets no mask but the places of the documents, as does flash attention in a single line,
               which would else read them from the device in each layer
    masked     False leaves out the mask, with which transformers takes slower kernels: padding is on the right, where
               no causal token looks
    """
    lines, width = segment.input_ids.shape
    varlen = attention == VARLEN
    inputs: dict[str, Any] = {"attention_mask": None, "position_ids": segment.position_ids}
    if segment.position_ids is None:
        inputs = {"attention_mask": segment.attention_mask if masked and segment.padded and not varlen else None}
    if varlen or (is_flash(attention) and lines == 1):
        longest = max(segment.lengths) if segment.lengths and lines == 1 else width
        inputs |= {"cu_seq_lens_q": segment.starts, "cu_seq_lens_k": segment.starts}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
    return inputs
