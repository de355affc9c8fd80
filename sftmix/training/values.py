"""The values of a model that is sharded before it has any: each rank fills its own shards, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from sftmix.training.distributed import World


class Values:
    """What the parameters of a model on the meta device are to be.

    values     the value of each parameter, in any dtype, by the name that `named_parameters` gives it
    from_main  whether rank 0 alone has `values`, which it then sends tensor by tensor, and the buffers at once; without
               it, every rank has all of them (mapped from a file: a rank reads what it keeps)
    checks     what the model has to pass once it has its values; called on every rank, inside a forward
    Create it on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        values: Mapping[str, Tensor],
        world: World,
        *,
        from_main: bool,
        checks: Sequence[Callable[[Any], object]] = (),
    ) -> None:
        self.checks = checks
        self._values = dict(values)
        self._world = world
        self._sent: dict[str, torch.dtype] | None = None
        if from_main and world.size > 1:
            self._sent = world.share({name: value.dtype for name, value in self._values.items()})
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def fill(self, model: nn.Module) -> None:
        """Put values in the place of the sharded parameters on the meta device, in the dtype of those.

        The values are let go as they are used. A parameter with several names (tied) has one value and stays one.
        """
        made: dict[int, nn.Parameter] = {}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if parameter.device.type == "meta":
                if id(parameter) not in made:
                    made[id(parameter)] = self._shard(name, parameter)
                owner, _, key = name.rpartition(".")
                setattr(model.get_submodule(owner), key, made[id(parameter)])

    def _shard(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """This rank's part, as `fully_shard` cuts it: along the first dimension, as torch.chunk does."""
        like = cast(DTensor, parameter.data)
        mesh, last = like.device_mesh, like.device_mesh.ndim - 1
        value = self._whole(name, like)
        parts, place = torch.chunk(value, mesh.size(last), dim=0), mesh.get_local_rank(last)
        own = parts[place] if place < len(parts) else value[:0]
        local = own.to(self._world.device, like.dtype, copy=True)
        assert local.shape == like.to_local().shape, f"{name}: {local.shape}, not {like.to_local().shape}"
        whole = DTensor.from_local(
            local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return nn.Parameter(whole, requires_grad=parameter.requires_grad)

    def _whole(self, name: str, like: Tensor) -> Tensor:
        """The whole value: on this rank already, or sent by rank 0."""
        if self._sent is None:
            return self._values.pop(name)
        if self._world.is_main:
            value = self._values.pop(name).detach().to(self._world.device).contiguous()
        else:
            value = torch.empty(like.shape, dtype=self._sent[name], device=self._world.device)
        dist.broadcast(value, src=0)
        return value
