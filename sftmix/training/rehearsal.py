"""What a resume would ask for and bring back, compared after the first update with what is there."""

from itertools import chain
from typing import Any

import torch
from torch import nn

from sftmix.ranks.world import World
from sftmix.training.checkpoint import tensors_of, trained_of
from sftmix.training.optimizer_state import comes_back, kept_values, sharing
from sftmix.training.parallel import reshard, unwrap
from sftmix.words.errors import ConfigError


def kept(wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return by name what a resume asks for, shapes and dtypes of weights, and all that the optimizer keeps."""
    module = unwrap(wrapped)
    found = {name: (x.shape, x.dtype) for name, x in tensors_of(module, None)[0].items()}
    return kept_values(trained_of(module), optimizer) | found


def rehearse(wrapped: nn.Module, optimizer: torch.optim.Optimizer, before: dict[str, Any], world: World) -> list[str]:
    """Compare what a resume would ask for and bring back with what is there now; the optimizer is not written.

    before  what was `kept` before the first update, and will be at a resume
    Returns the trained parameters of which the optimizer keeps nothing. Raises ConfigError on every rank for the first
    thing that would not come back on any.
    """
    reshard(wrapped)  # after a forward of a callback: the optimizer does not know what is gathered
    trained, now = trained_of(unwrap(wrapped)), kept(wrapped, optimizer)
    lost = [f"state[{owner!r}]" for owner in optimizer.state.keys() - {*trained.values()}]
    lost += [name for name in before | now if not comes_back(trained, name, now.get(name), before.get(name))]
    lost = lost or sharing({name: x for name, x in now.items() if isinstance(x, torch.Tensor)})
    if name := next(chain.from_iterable(world.gather(lost[:1])), None):
        raise ConfigError(
            f"no checkpoint would bring back {name}, so a resumed run would be another one. An optimizer may keep "
            "tensors and numbers of a parameter or a group; if ranks share the weights, tensors that are divided like "
            "their parameter, or on every rank in whole. A model makes its buffers as it is built"
        )
    return [name for name, parameter in trained.items() if optimizer.state and parameter not in optimizer.state]
