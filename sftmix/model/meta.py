"""Loading in three steps for ranks that share the weights: no rank may hold the whole model.

    1. a model with its values        `sftmix.model.mapped`: each rank maps the safetensors files, which copies nothing.
                                      If several dtypes or DoRA do not allow this, rank 0 loads the whole model, and
                                      the others have an `empty_model`.
    2. the values without the model   `carry`: the model keeps float32 parameters on the meta device, which are
                                      sharded like any other model's (`sftmix.training.parallel.wrap`). It carries its
                                      values, and whoever gets the model need not know of them.
    3. the values in the shards       `fill`: a rank never holds more than its shards and one tensor

transformers handles names, conversions and missing weights, as in a plain load.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from sftmix.ranks.world import World

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
