"""Decoder layers, whose activations may be recomputed in the backward, and weights that are not trained.

Text never goes through some of them, such as a vision tower's. They get no gradient, so an optimizer would have state
that no step made, and DDP would wait for them. What trains, stores or wraps weights asks `requires_grad` alone.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from sftmix.model.experts import expert_weights
from sftmix.words.errors import ConfigError


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks of the decoder, which transformers itself never splits; none is inside another."""
    names = model._no_split_modules or ()  # Gemma 3: SiglipEncoderLayer, Gemma3DecoderLayer, ...
    parts = model.get_decoder().modules()
    layers = [m for m in parts if any(cls.__name__ in names for cls in type(m).__mro__)]  # FSDP2 puts a class before it
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} names no decoder layers (_no_split_modules): use --training.parallel ddp, without "
            "--training.compile"
        )
    # Mamba names its MambaMixer beside the MambaBlock around it; a ZambaHybridLayer holds a ZambaMambaDecoderLayer.
    inner = {part for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if layer not in inner]


def recompute_activations(model: PreTrainedModel) -> None:
    """Checkpoint each decoder layer; ConfigError for a model that cannot, as JetMoE."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # older versions of transformers have the other
    try:
        (enable or model.gradient_checkpointing_enable)()
    except ValueError as error:
        raise ConfigError(f"training.activation_checkpointing true: {error} Set it to false.") from error


def freeze_unused(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze what is outside the decoder, the input embeddings and the LM head, in place; return the model."""
    used = _used(model)
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)
    return model


def keep_in_bfloat16(model: PreTrainedModel, *, trains: bool) -> None:
    """Keep the matrices that are not trained in bfloat16, in place; call it for a base that is stored and computed so.

    No state, loss or gradient changes by a bit: these are the weights of linear layers and experts, which are rounded
    to bfloat16 in each use. Embeddings (and a head tied to them), norms and biases stay float32: autocast does not
    round what they give. Adapters of experts, which PEFT adds to the weights, are rounded before they are added: then
    these sums change by a rounding, and are those of FSDP.

    trains  False: nothing is trained, whatever asks for gradients
    """
    embeddings = {part.weight for part in model.modules() if isinstance(part, nn.Embedding)}
    # bitsandbytes' layers have classes of their own
    linear = [layer.weight for layer in model.modules() if type(layer) is nn.Linear]
    for weight in [*linear, *expert_weights(model)]:
        if weight not in embeddings and not (trains and weight.requires_grad):
            weight.data = weight.data.to(torch.bfloat16)


def unused_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the largest modules that text never goes through, by their names; none if it is a model of text."""
    used = _used(model)
    unused: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parameters = {id(p) for p in module.parameters()}
        if parameters and not parameters & used and not name.startswith(tuple(f"{outer}." for outer in unused)):
            unused[name] = module  # Gemma 3: model.vision_tower, model.multi_modal_projector
    return unused


def _used(model: PreTrainedModel) -> set[int]:
    """Return the identities of the parameters that text goes through."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return {id(p) for part in parts if part is not None for p in part.parameters()}
