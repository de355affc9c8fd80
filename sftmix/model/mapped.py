"""A model with its values mapped from its files, or without values; the first step of `sftmix.model.meta`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftmix.model.head import active
from sftmix.model.layers import freeze_unused
from sftmix.model.load import load_model, model_config, stored_dtype, stored_weights, untie
from sftmix.model.rounding import kept_in_float32


def empty_model(path: str | Path, *, attention: str | None = None, tied: bool | None = None) -> PreTrainedModel:
    """Return the float32 model of a hub id or directory: parameters on the meta device, buffers on the CPU.

    The buffers are those that the model computes from its config (rotary frequencies); tied weights are tied.

    tied  whether LM head and input embeddings are one weight, if the files decide it; None: as the config says
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            model_config(path), dtype=torch.float32, attn_implementation=attention, experts_implementation=None
        )
    if tied is False:
        untie(model)
    model.tie_weights()  # each parameter was moved to the meta device by itself
    return freeze_unused(model.eval())


@contextmanager
def standing_in(model: PreTrainedModel) -> Iterator[None]:
    """Within, float32 zeros that take no memory are in the place of values in half precision.

    PEFT gives adapters the dtype of the weight beside them, and makes them by its shape. A module that is trained in
    full (`modules_to_save`) is a copy, which has the values of the original afterwards.
    """
    values = {parameter: parameter.data for parameter in model.parameters() if parameter.dtype.itemsize == 2}
    for parameter in values:
        parameter.data = torch.zeros(()).expand(parameter.shape)
    yield
    for parameter, value in values.items():
        parameter.data = value
    parts: Iterator[Any] = model.modules()
    for part in parts:
        if hasattr(part, "original_module"):
            for own, copy in zip(part.original_module.parameters(), active(part).parameters(), strict=True):
                copy.data = values.get(own, copy.data)


def mapped_model(path: str | Path, *, attention: str | None = None) -> PreTrainedModel | None:
    """Return the model with the values as they are in the files, for `take_values`, and the buffers of a plain load.

    Values that are mapped from disk take no memory until they are read, and the system can take this memory back.
    Returns None if the tensors in the files have several dtypes, which the model could not keep. What transformers
    keeps in float32 may have it.
    """
    stored = stored_dtype(path)
    model = load_model(path, dtype=stored, attention=attention)
    kept = kept_in_float32(model, stored)
    # None at all, if a hub has them in another snapshot than the config
    if {weight.dtype for name, weight in stored_weights(path) if not kept.search(name)} != {stored}:
        return None
    persistent = model.state_dict().keys()
    for name, buffer in empty_model(path, attention=attention).named_buffers():  # half precision rounds them
        stored_buffer = model.get_buffer(name)
        # a value of the files, as they have it, or one that the model computes (inv_freq)
        stored_buffer.data = stored_buffer.to(buffer.dtype) if name in persistent else buffer
    for config in (model.config, model.config.get_text_config()):
        config.dtype = torch.float32
    return model
