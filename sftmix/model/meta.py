"""Loading in three steps for ranks that share the weights: no rank may hold the whole model.

    1. a model with its values        `mapped_model`: every rank maps the safetensors files, which copies nothing.
                                      If dtypes or adapters do not allow this, rank 0 loads the whole model, and the
                                      others have an `empty_model`.
    2. the values without the model   `carry`: the model keeps float32 parameters on the meta device, which are
                                      sharded like any other model's (`sftmix.training.parallel.wrap`). It carries its
                                      values, and whoever gets the model need not know of them.
    3. the values in the shards       `fill`: a rank never holds more than its shards and one tensor

transformers handles names, conversions and missing weights, as in a plain load.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftmix.model.layers import freeze_unused
from sftmix.model.load import load_model, model_config, stored_dtype, untie, weight_files_of
from sftmix.ranks.world import World

# ------------------------------------------------------------------------------- 1. a model with its values


def empty_model(path: str | Path, *, attention: str | None = None, tied: bool | None = None) -> PreTrainedModel:
    """Return the float32 model of a hub id or directory: parameters on the meta device, buffers on the CPU.

    The buffers are those that the model computes from its config (rotary frequencies); tied weights are tied.

    tied  whether LM head and input embeddings are one weight, if the files decide it; None: as the config says
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config(path), dtype=torch.float32, attn_implementation=attention)
    if tied is False:
        untie(model)
    model.tie_weights()  # each parameter was moved to the meta device by itself
    return freeze_unused(model.eval())


def mapped_model(path: str | Path, *, attention: str | None = None) -> PreTrainedModel | None:
    """Return the model with the values as they are in the files, for `take_values`, and the buffers of a plain load.

    Values that are mapped from disk take no memory until they are read, and the system can take this memory back.
    Returns None if the tensors in the files have several dtypes, which the model could not keep.
    """
    stored = stored_dtype(path)
    model = load_model(path, dtype=stored, attention=attention)
    files = [safe_open(file, framework="pt") for file in weight_files_of(path)]
    # None at all, if a hub has them in another snapshot than the config
    if {file.get_tensor(name).dtype for file in files for name in file.keys()} != {stored}:  # noqa: SIM118
        return None
    persistent = model.state_dict().keys()
    for name, buffer in empty_model(path, attention=attention).named_buffers():  # half precision rounds them
        stored_buffer = model.get_buffer(name)
        # a value of the files, as they have it, or one that the model computes (inv_freq)
        stored_buffer.data = stored_buffer.to(buffer.dtype) if name in persistent else buffer
    for config in (model.config, model.config.get_text_config()):
        config.dtype = torch.float32
    return model


# ------------------------------------------------------------------------------- 2. the values apart from it


def take_values(model: PreTrainedModel) -> dict[str, Tensor]:
    """Move the values of all parameters out of the model; it keeps float32 parameters on the meta device.

    Tied parameters stay tied and have one value, under the name that `named_parameters` gives them.
    """
    values = {name: parameter.data for name, parameter in model.named_parameters()}
    _replace_parameters(model, lambda _, old: torch.empty(old.shape, dtype=torch.float32, device="meta"))
    return values


def _replace_parameters(model: nn.Module, new: Callable[[str, Any], Tensor]) -> None:
    """Put a new value in the place of each parameter; those with several names (tied) have one value and stay one."""
    others = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if id(old) not in others:
            others[id(old)] = nn.Parameter(new(name, old), requires_grad=old.requires_grad)
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, others[id(old)])


# ------------------------------------------------------------------------------- 3. the values in the shards


def carry(model: PreTrainedModel, world: World, *, from_main: bool, check: Callable[[PreTrainedModel], Any]) -> None:
    """Take the values out of a model, which carries them until `fill`; call it on every rank.

    from_main  True: only rank 0 has values; it sends the buffers now, the values tensor by tensor in `fill`.
               False: every rank has all values (mapped from a file: a rank reads what it keeps)
    check      gives the LM head of the model once it has its values; called on every rank, inside a forward
    """
    values = take_values(model)
    sent: dict[str, torch.dtype] = {}
    if from_main:
        sent = world.share({name: value.dtype for name, value in values.items()})
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    def shard(name: str, like: Any) -> Tensor:
        """Return this rank's part of a value, with memory of its own, cut (or whole) and in the dtype as `like` is."""
        value = values.pop(name)
        if value.is_meta:
            value = torch.empty(value.shape, dtype=sent[name], device=world.device)  # room for what rank 0 sends
        value = value.to(world.device).contiguous()
        if sent:
            dist.broadcast(value, src=0)
        value = value.to(like.dtype)
        if isinstance(like, DTensor):
            # None: each rank cuts its part of the value that it has, and nothing is sent.
            value = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
        return value.clone()

    carrier: Any = model
    carrier.values_to_come = shard, check  # a plain attribute, which no state_dict has


def fill(model: PreTrainedModel) -> Callable[[PreTrainedModel], Any] | None:
    """Put the values that a model carries in the place of its parameters on the meta device.

    Each is released after its use. Returns the check of them; None for a model that carries none, and stays as it is.
    """
    shard, check = model.__dict__.pop("values_to_come", (None, None))
    if shard is not None:
        _replace_parameters(model, shard)
    return check
