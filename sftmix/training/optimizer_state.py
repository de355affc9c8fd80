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
from pathlib import Path
from typing import Any

import torch

from sftmix.disk.files import naming_damage, read_json
from sftmix.words.errors import CheckpointError

Parameters = Mapping[str, torch.nn.Parameter]
"""The trained ones, by name."""


def entries(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all that an optimizer keeps of parameters and groups, by name."""
    names = {parameter: name for name, parameter in parameters.items()}
    found = dict[str, Any]()
    for group in optimizer.param_groups:
        owner = names[group["params"][0]]
        found |= {_name("param_groups", owner, key): value for key, value in group.items() if key != "params"}
    for owner, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            kind = "state" if getattr(value, "device", parameter.device) == parameter.device else "host"
            found[_name(kind, owner, key)] = value
    return found


def kept_values(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return by name all that an optimizer keeps, for `comes_back`: a list, which may be written in place, as text.

    Also what it keeps for itself, which is never stored, so that it may not change: numbers, as a rank, and lists of
    them; tensors, with how often they were written; and the state of another optimizer in it.
    """
    found = {name: _as_it_is(value) for name, value in entries(parameters, optimizer).items()}
    for name, value in vars(optimizer).items():
        if isinstance(value, torch.optim.Optimizer):
            found[f"self.{name}.state"] = repr(bool(value.state) and value.state is not optimizer.state)
        elif isinstance(value, torch.Tensor):
            found[f"self.{name}"] = f"{id(value)} written {value._version} times"
        elif not name.startswith("_") and name not in ("defaults", "state", "param_groups") and _is_plain(value):
            found[f"self.{name}"] = repr(value)
    return found


def _as_it_is(value: Any) -> Any:
    return value if isinstance(value, (int, float, torch.Tensor)) else repr(value)


def _is_plain(value: Any) -> bool:
    """Return True for a number, and for lists and mappings of numbers; a flag may say what each process does once."""
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, (list, tuple)):
        return all(isinstance(inner, str) or _is_plain(inner) for inner in value)
    return type(value) in (int, float)


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


def restored(parameters: Parameters, optimizer: Any, stored: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Give an optimizer the numbers of a checkpoint, and empty tensors by name, into which the stored ones are read.

    stored  name -> size and dtype of the checkpoint's tensors, as torch's readers describe them
    file    the numbers
    Raises CheckpointError for a parameter that is not there, DifferenceError for what `state_of` does not return.
    """
    with naming_damage(file):  # of somebody else's run it may hold anything
        try:
            tensors = {name: empty(parameters, name, x.size, x.properties.dtype) for name, x in stored.items()}
            put_state(parameters, optimizer, tensors, read_json(file))
        except KeyError as unknown:
            raise CheckpointError(f"{file.parent} holds the state of {unknown}, which is not trained here") from unknown
    return tensors


def put_state(parameters: Parameters, optimizer: Any, tensors: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Give an optimizer what `state_of` has returned; KeyError for a parameter that is not there.

    What a group has beside its parameters comes back for a class of your own, which may change it. The groups of
    torch's optimizers stay as they are built, from options that the stage's inputs record.
    """
    known = type(optimizer).__module__.startswith(("torch.", "sftmix."))
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, value in {**others, **tensors}.items():
        kind, owner, key = _parts(name)
        parameter = parameters[owner]
        if not isinstance(value, torch.Tensor | str):
            float(value)  # raises an error for what is no number: null, a list, 400 digits
        if kind == "param_groups" and known:
            continue
        holder = groups[parameter] if kind == "param_groups" else optimizer.state.setdefault(parameter, {})
        holder[key] = tensors[value] if isinstance(value, str) else value


def comes_back(parameters: Parameters, name: str, value: Any, before: Any) -> bool:
    """Return True if a resume would give the optimizer this value of `kept_values`; `before` is the one as built."""
    if name.endswith("]"):
        return False
    if isinstance(value, torch.Tensor):
        copied = empty(parameters, name, value.shape, value.dtype)
        return type(copied) is type(value) and (copied.device, copied.layout) == (value.device, value.layout)
    return isinstance(value, (int, float)) or value == before


def sharing(tensors: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that share the memory of an earlier tensor; a resume would separate the two."""
    first, found = dict[int, Any](), list[str]()
    for name, tensor in tensors.items():
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if part.numel() and first.setdefault(part.untyped_storage()._cdata, tensor) is not tensor:
            found.append(name)
    return found


def _name(kind: str, owner: str, key: Any) -> str:
    """Return the name of an entry; "state.wte.weight[0]" if no `_parts` would find its key again."""
    return f"{kind}.{owner}.{key}" if isinstance(key, str) and "." not in key else f"{kind}.{owner}[{key!r}]"


def _parts(name: str) -> list[str]:
    return re.split(r"\.(.*)\.", name)
