"""The numbers of a model: how many there are, and how many are trained."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from sftmix.components.base import Objective
from sftmix.components.component import Need
from sftmix.model.head import adapter_config
from sftmix.model.layers import decoder_layers
from sftmix.words.errors import ConfigError


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers; none of a model that names none, which then cannot compute them again."""
    try:
        return decoder_layers(model)
    except ConfigError:
        return []


class Count:
    """How many numbers some parameters have: all of them, and those that are trained."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.all = self.trained = 0
        for parameter in parameters:
            self.all += parameter.numel()
            self.trained += parameter.numel() * parameter.requires_grad


class Numbers:
    """The numbers of a model, whose parameters may be DTensors, or have no values; a tied weight's count once.

    whole       all of them
    layers      those of the `n_layers` decoder layers
    outside     those of embeddings, last norm and head; what text never goes through is in neither
    embeddings  those of the input embeddings, which may be the head's as well
    head        the weight of the LM head, [V, D]
    recomputes  the model can compute its layers again
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers, head = layers_of(model), model.get_output_embeddings()
        inside = {one for layer in layers for one in layer.parameters()}
        self.whole, self.layers = Count(model.parameters()), Count(inside)
        self.outside = Count({*model.get_decoder().parameters(), *head.parameters()} - inside)
        self.embeddings = Count(model.get_input_embeddings().parameters())
        self.n_layers = max(len(layers), 1)
        self.head = head.weight
        self.head_trains = any(one.requires_grad for one in head.parameters())
        self.recomputes = model.supports_gradient_checkpointing
        self.tied = self.head is model.get_input_embeddings().weight


SECOND = 4
"""Bytes of a teacher's weights per trained number: float32, as the trained ones, which they are exchanged with."""


def is_base(objective: Objective, model: nn.Module) -> bool:
    """Return True if a teacher is the model without its adapters, of which there is no second copy.

    Biases that adapters train (model.lora.bias) are the model's own, and stay without the adapters.
    """
    adapters = adapter_config(model)
    return objective.teacher_decay is None and adapters is not None and adapters.bias == "none"


def teacher_bytes(objective: Objective, model: nn.Module) -> float:
    """Return the bytes of an objective's teacher per trained number of the model."""
    return SECOND if Need.TEACHER in objective.needs and not is_base(objective, model) else 0
