"""The state of an optimizer by names: what a checkpoint holds of it, and how it comes back.

What is stored comes back in its own dtype; what is not stored is absent, as it was in the run that was not killed.
torch's own functions make a step to find out what a state looks like, which writes the optimizer, and they bring a
state in the dtype of its parameter.

    state.PARAMETER.KEY         a tensor or a number of a parameter
    host.PARAMETER.KEY          a tensor on the host, of a parameter on another device
    param_groups.PARAMETER.KEY  a tensor or a number of the group that begins with this parameter
    optimizer..KEY              a number of the optimizer itself
"""

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

Parameters = Mapping[str, torch.nn.Parameter]
"""The trained ones, by name."""


def state_of(parameters: Parameters, optimizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of the state by name, each once, and what JSON holds of it.

    These are numbers; a tensor that has a second name, as a table that all parameters share, is there by its first.
    """
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, value in _entries(parameters, optimizer).items():
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
        if kind == "optimizer":
            holder = vars(optimizer)
        elif kind == "param_groups":
            holder = groups[parameters[owner]]
        else:
            holder = optimizer.state.setdefault(parameters[owner], {})
        holder[key] = tensors[value] if isinstance(value, str) else value


def as_built(optimizer: torch.optim.Optimizer) -> SimpleNamespace:
    """Return a copy of an optimizer as a resume finds it, for `lost_state`."""
    return SimpleNamespace(state={}, param_groups=[dict(group) for group in optimizer.param_groups])


def lost_state(parameters: Parameters, optimizer: torch.optim.Optimizer, built: SimpleNamespace) -> list[str]:
    """Return the names of what would not come back as it is: the state goes out, and into the copy `built`.

    Of tensors the kinds are compared, not the numbers.
    """
    if foreign := optimizer.state.keys() - {*parameters.values()}:
        return [f"state[{key!r}]" for key in foreign]
    tensors, others = state_of(parameters, optimizer)
    put_state(parameters, built, tensors, json.loads(json.dumps(others)))
    now = _entries(parameters, optimizer)
    then = _entries(parameters, built)
    lost = [name for name, value in now.items() if value is not then.get(name) and repr(value) != repr(then.get(name))]
    return lost + [
        name for name, one in tensors.items() if _kind(empty(parameters, name, one.shape, one.dtype)) != _kind(one)
    ]


def _entries(parameters: Parameters, optimizer: Any) -> dict[str, Any]:
    """Return by name what an optimizer keeps."""
    names = {parameter: name for name, parameter in parameters.items()}
    found = {f"optimizer..{key}": value for key, value in vars(optimizer).items() if type(value) in (int, float)}
    for group in optimizer.param_groups:
        found |= {f"param_groups.{names[group['params'][0]]}.{key}": value for key, value in group.items()}
    for owner, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            kind = "state" if getattr(value, "device", parameter.device) == parameter.device else "host"
            found[f"{kind}.{owner}.{key}"] = value
    return found


def _parts(name: str) -> tuple[str, str, str]:
    kind, _, rest = name.partition(".")
    owner, _, key = rest.rpartition(".")
    return kind, owner, key


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.device, tensor.layout, getattr(tensor, "placements", None)
