"""The weights of a model that text never goes through, as those of a vision tower: they are not trained.

They get no gradient, so an optimizer would have state that no step made, and DDP would wait for them. What trains,
stores or wraps weights asks `requires_grad` alone.
"""

from torch import nn
from transformers import PreTrainedModel


def freeze_unused(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze what lies outside the decoder, the input embeddings and the LM head, in place; return the model."""
    used = _used(model)
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)
    return model


def unused_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the largest modules that hold such weights alone, by their names; none of a model of text."""
    used = _used(model)
    unused: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parameters = {id(p) for p in module.parameters()}
        if parameters and not parameters & used and not name.startswith(tuple(f"{outer}." for outer in unused)):
            unused[name] = module
    return unused


def _used(model: PreTrainedModel) -> set[int]:
    """Return the identities of the parameters that text goes through."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return {id(p) for part in parts if part is not None for p in part.parameters()}
