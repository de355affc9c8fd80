"""What is done to each decoder layer before the model is wrapped: recomputation first, then compilation."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from sftmix.errors import ConfigError

RECOMPILE_LIMIT = 32
"""Variants of a layer that are compiled, at most: with and without mask, gradients, one example or several, ..."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks that transformers itself never splits."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [m for m in model.modules() if type(m).__name__ in names and not isinstance(m, nn.Embedding)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} names no decoder layers (_no_split_modules): use --training.parallel ddp, without "
            "--training.compile"
        )
    return layers


def recompute_activations(model: nn.Module) -> None:
    """Checkpoint each decoder layer, by the name that this version of transformers has for it."""
    own: Any = model
    if hasattr(own, "activation_checkpointing_enable"):
        own.activation_checkpointing_enable({"use_reentrant": False})
    else:
        own.gradient_checkpointing_enable({"use_reentrant": False})


def check_compiler(device: torch.device) -> None:
    """ConfigError where torch.compile has nothing to compile with, before anything is read."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise ConfigError(
                "training.compile true needs the package triton on a GPU: pip install triton, or leave it out"
            )
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ConfigError(
            "training.compile true needs a C++ compiler on a CPU, and there is none: install g++, name another one in "
            "the variable CXX, or leave training.compile out"
        ) from error


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer by itself, in place: layers of one kind share what was compiled, names stay.

    Lengths differ from batch to batch, so they are symbols of what is compiled. After `recompute_activations`, before
    the layers are sharded.
    """
    from torch._dynamo import config  # takes a second to import

    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)
