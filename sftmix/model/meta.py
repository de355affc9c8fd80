"""Loading for ranks that share the weights: only rank 0 ever holds the whole model, in host memory.

Rank 0 loads the model, the others an `empty_model`. `take_values` leaves float32 parameters on the meta device, which
are sharded like those of any other model (`sftmix.training.parallel.wrap`), and `Values.fill` sends each tensor into
the shards. transformers handles names, conversions and missing weights, as in a plain load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftmix.common.world import World
from sftmix.model.load import model_config
from sftmix.model.unused import freeze_unused


def empty_model(path: str | Path, *, attention: str | None = None) -> PreTrainedModel:
    """Return the float32 model of a hub id or directory: parameters on the meta device, buffers on the CPU.

    The buffers are those that the model computes from its config (rotary frequencies); tied weights are tied.
    """
    from accelerate import init_empty_weights

    options = {} if attention is None else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config(path), dtype=torch.float32, **options)
    model.tie_weights()  # each parameter was moved to the meta device by itself
    return freeze_unused(model.eval())


def take_values(model: PreTrainedModel) -> dict[str, Tensor]:
    """Move the values of all parameters out of the model; it keeps float32 parameters on the meta device.

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


class Values:
    """The values for the parameters of a model on the meta device. Create it on every rank: the buffers are sent.

    values  those of `take_values` in float32, of which the ones of rank 0 count
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor], world: World) -> None:
        self._values, self._world = dict(values) if world.is_main else {}, world
        if world.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def fill(self, model: nn.Module) -> None:
        """Put the values in the place of the sharded parameters on the meta device, and release each after its use.

        A shard has memory of its own, and is cut as `fully_shard` cuts it. A parameter with several names (tied) has
        one value and stays one.
        """
        made: dict[int, nn.Parameter] = {}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if parameter.device.type != "meta":
                continue
            if id(parameter) not in made:
                like = cast(DTensor, parameter.data)
                value = torch.empty(like.shape, device=self._world.device)
                if self._world.is_main:
                    value.copy_(self._values.pop(name))
                if self._world.size > 1:
                    dist.broadcast(value, src=0)
                whole = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
                made[id(parameter)] = nn.Parameter(whole.clone(), requires_grad=parameter.requires_grad)
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, made[id(parameter)])
