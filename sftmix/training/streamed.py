"""The values of a model, sent from rank 0 to all ranks one group of parameters at a time, as the groups are sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from sftmix.training.distributed import World


class StreamedWeights:
    """Values for a model whose parameters are on the meta device on every rank.

    values  of each parameter, by the name that `named_parameters` gives it, on rank 0 and in any dtype; None elsewhere.
            They leave the mapping as they are sent.
    checks  what the model has to pass once it has its values; called on every rank, inside a forward
    Create it on every rank. It makes the buffers of all ranks those of rank 0.
    """

    def __init__(
        self,
        model: nn.Module,
        values: Mapping[str, Tensor] | None,
        world: World,
        *,
        checks: tuple[Callable[[Any], object], ...] = (),
    ) -> None:
        self.checks = checks
        self._values = dict(values or {})
        self._world = world
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._dtypes = world.share({name: value.dtype for name, value in self._values.items()})
        for _, buffer in model.named_buffers():
            self._from_main(buffer)

    def fill(self, module: nn.Module) -> None:
        """Give the parameters below `module` that are still on the meta device their values, in their own dtype.

        On every rank in the same order; a parameter with several places is sent once and stays one.
        """
        made: dict[int, nn.Parameter] = {}
        for owner in module.modules():
            for key, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
                if parameter.is_meta and not isinstance(parameter, DTensor):
                    if id(parameter) not in made:
                        made[id(parameter)] = self._receive(parameter)
                    setattr(owner, key, made[id(parameter)])

    def _receive(self, parameter: nn.Parameter) -> nn.Parameter:
        name = self._names[id(parameter)]
        if self._world.is_main:
            value = self._values.pop(name).to(self._world.device)
        else:
            value = torch.empty(parameter.shape, dtype=self._dtypes[name], device=self._world.device)
        self._from_main(value)
        return nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)

    def _from_main(self, value: Tensor) -> None:
        if self._world.size > 1:
            dist.broadcast(value.detach(), src=0)
