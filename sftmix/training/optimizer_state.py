"""The state of an optimizer by names: what a checkpoint holds of it, and how it comes back.

What is stored comes back in its own dtype; what is not stored is absent, as it was in the run that was not killed.
torch's own functions make a step to find out what a state looks like, which writes the optimizer, and they bring a
state in the dtype of its parameter.

    state.PARAMETER.KEY         a tensor or a number of a parameter
    host.PARAMETER.KEY          a tensor on the host, of a parameter on another device
    param_groups.PARAMETER.KEY  a tensor or a number of the group that begins with this parameter
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

Parameters = Mapping[str, torch.nn.Parameter]
"""The trained ones, by name."""


def entries(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all that an optimizer keeps of parameters and groups, by name."""
    names = {parameter: name for name, parameter in parameters.items()}
    found = dict[str, Any]()
    for group in optimizer.param_groups:
        found |= {f"param_groups.{names[group['params'][0]]}.{key}": value for key, value in group.items()}
    for owner, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            kind = "state" if getattr(value, "device", parameter.device) == parameter.device else "host"
            found[f"{kind}.{owner}.{key}"] = value
    return found


def state_of(parameters: Parameters, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of the state by name, each once, and what JSON holds of it.

    These are numbers; a tensor that has a second name, as a table that all parameters share, is there by its first.
    """
    tensors, others, first = dict[str, Any](), dict[str, Any](), dict[int, str]()
    for name, value in entries(parameters, optimizer).items():
        if isinstance(value, torch.Tensor) and first.setdefault(id(value), name) == name:
            tensors[name] = value
        elif isinstance(value, (int, float, torch.Tensor)):
            others[name] = first.get(id(value), value)
    return tensors, others


def empty(parameters: Parameters, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor to read a stored one into; KeyError for a parameter that is not there."""
    kind, owner, _ = _parts(name)
    parameter = parameters[owner].detach()
    if shape == parameter.shape:  # ranks share it as they share its parameter
        return torch.empty_like(parameter, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device="cpu" if kind == "host" else parameter.device)


def put_state(parameters: Parameters, optimizer: Any, tensors: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Give an optimizer what `state_of` has returned; KeyError for a parameter that is not there."""
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, value in {**others, **tensors}.items():
        kind, owner, key = _parts(name)
        parameter = parameters[owner]
        holder = groups[parameter] if kind == "param_groups" else optimizer.state.setdefault(parameter, {})
        holder[key] = tensors[value] if isinstance(value, str) else value


def comes_back(parameters: Parameters, name: str, value: Any, before: Any) -> bool:
    """Return True if a resume would give the optimizer this value; `before` is what it had as it was built."""
    if isinstance(value, torch.Tensor):
        copied = empty(parameters, name, value.shape, value.dtype)
        return type(copied) is type(value) and (copied.device, copied.layout) == (value.device, value.layout)
    return isinstance(value, (int, float)) or value is before or repr(value) == repr(before)


def _parts(name: str) -> list[str]:
    return re.split(r"\.(.*)\.", name)
