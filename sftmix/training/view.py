"""The view of an objective's loss on a model: its embeddings, and passes of the backbone over changed states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from sftmix.common.errors import ConfigError
from sftmix.components.view import LossView
from sftmix.model.head import Head
from sftmix.model.layers import decoder_layers, recomputes_activations


class ModelView(LossView):
    """A view for one micro-batch in training; see `LossView`."""

    def __init__(
        self, model: PreTrainedModel, head: Head, hidden: Callable[[], torch.Tensor], *, chunk_size: int | None
    ) -> None:
        super().__init__(head, hidden, chunk_size=chunk_size)
        self._model = model

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._model.get_input_embeddings()(input_ids)

    def states(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        *,
        layer: int = 0,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        mask, positions = mask.long(), mask.cumsum(1).sub(1).clamp(min=0)
        changing: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if change is not None and layer == 0:
            embeddings = change(embeddings)
        elif change is not None:
            changing = self._layer(layer).register_forward_hook(
                lambda module, inputs, output: _replaced(output, change)
            )
        with changing:
            out = self._model.get_decoder()(
                inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
            )
        return out.last_hidden_state

    def _layer(self, layer: int) -> torch.nn.Module:
        """Return a decoder layer, from 1; ConfigError if there is none, or if its activations are recomputed."""
        layers = decoder_layers(self._model)
        if not 1 <= layer <= len(layers):
            raise ConfigError(f"no decoder layer {layer}; allowed: 1 to {len(layers)}, and 0, the embeddings")
        if recomputes_activations(self._model):  # the backward would make the layer's forward without the hook
            raise ConfigError(
                f"training.activation_checkpointing true and a change of the states after layer {layer} exclude each "
                "other; leave it out, or change the embeddings (layer 0)"
            )
        return layers[layer - 1]


def _replaced(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return what a layer made with changed states; some versions of transformers return them first in a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
