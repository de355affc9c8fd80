"""Loading for ranks that share the weights: a model on the meta device, and its values apart from it.

`training.values` puts them into the shards of each rank, which then never holds more than its shards and one tensor.
Every rank maps the safetensors files, which copies nothing; where their dtypes or adapters do not allow it, rank 0
loads the whole model and sends it tensor by tensor. Names, conversions and missing weights are transformers' own
business, as in a plain load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from sftmix.models import load_model, model_config, stored_dtype

_NAMES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def empty_model(path: str | Path, *, attention: str | None = None) -> PreTrainedModel:
    """The float32 model of a hub id or directory, its parameters on the meta device and its buffers on the CPU.

    The buffers are those that the model computes of its config (rotary frequencies); tied weights are tied.
    """
    from accelerate import init_empty_weights

    options = {} if attention is None else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config(path), dtype=torch.float32, **options)
    model.tie_weights()  # each parameter was moved to the meta device by itself
    return model.eval()


def mapped_model(path: str | Path, *, attention: str | None = None) -> PreTrainedModel | None:
    """The model with the values as they are in the files, for `take_values`; its buffers are those of a plain load.

    They are mapped from disk: they take no memory before they are read, and the system takes it back when it needs it.
    None where the tensors in the files have several dtypes, which the model could not keep.
    """
    stored = stored_dtype(path)
    model = load_model(path, dtype=stored, attention=attention)
    if _dtypes_of_files(path) != {stored}:
        return None
    persistent = model.state_dict().keys()
    for name, buffer in empty_model(path, attention=attention).named_buffers():  # in half precision they are rounded
        parent, _, key = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, key, getattr(owner, key).to(buffer.dtype) if name in persistent else buffer)
    for config in (model.config, model.config.get_text_config()):
        config.dtype = torch.float32
    return model


def _dtypes_of_files(path: str | Path) -> set[torch.dtype | None]:
    """Dtypes of all tensors in the safetensors files of a model that was loaded before; empty where none are found."""
    return {
        _NAMES.get(file.get_slice(name).get_dtype())
        for place in _files(path)
        for file in [safe_open(place, framework="pt")]
        for name in file.keys()  # noqa: SIM118 (not a dict)
    }


def _files(path: str | Path) -> Iterator[Path]:
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            place = cached_file(str(Path(path).expanduser()), name, local_files_only=True)
        except OSError:
            continue
        found = Path(str(place))
        if name == SAFE_WEIGHTS_NAME:
            yield found
        else:
            yield from {found.parent / file for file in json.loads(found.read_text())["weight_map"].values()}
        return


def take_values(model: PreTrainedModel) -> dict[str, Tensor]:
    """Move the values of all parameters out of the model, which keeps float32 parameters on the meta device.

    Tied parameters stay tied and have one value, under the name that `named_parameters` gives them.
    """
    values = {name: parameter.data for name, parameter in model.named_parameters()}
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            shape = torch.empty(parameter.shape, dtype=torch.float32, device="meta")
            made = nn.Parameter(shape, requires_grad=parameter.requires_grad)
            setattr(module, key, empty.setdefault(id(parameter), made))
    return values
