"""The decoder layers of a model, and whether their activations are recomputed in the backward."""

from torch import nn
from transformers import PreTrainedModel

from sftmix.common.errors import ConfigError


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks of the decoder, which transformers itself never splits; none lies in another."""
    names = model._no_split_modules or ()
    parts = (m for m in model.get_decoder().modules() if not isinstance(m, nn.Embedding))
    layers = [m for m in parts if any(cls.__name__ in names for cls in type(m).__mro__)]  # FSDP2 puts a class before it
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} names no decoder layers (_no_split_modules): use --training.parallel ddp, without "
            "--training.compile"
        )
    inner = {part for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if layer not in inner]


def recompute_activations(model: PreTrainedModel) -> None:
    """Checkpoint each decoder layer."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # older versions of transformers have the other
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def recomputes_activations(model: PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
