"""Inputs of a stage that another release recorded, completed with the options that it did not have.

An option that comes with a release has a default that does what was done before, so recorded inputs without the option
are those of its default. A release that changes what an option, a default or a stage does raises the stage's `version`
(`StageSpec`), by which earlier directories of the stage are refused.
"""

from collections.abc import Mapping
from typing import Any

from sftmix.components.component import Component, plain
from sftmix.config.schema import options_of
from sftmix.options.data import DataOptions
from sftmix.options.model import LoraOptions
from sftmix.options.training import TrainingOptions

GROUPS = {"data": DataOptions, "lora": LoraOptions, "training": TrainingOptions}
"""Input of a stage -> the group of options that it holds."""


def completed(recorded: Any, other: Any) -> Any:
    """Return the recorded inputs of a stage with each option that they lack and the other ones have, at its default.

    Options are those of GROUPS and of components. An input that is no option has no default: if one side lacks it, the
    inputs differ. A recorded option that no class here has differs as well.
    """
    return _filled(recorded, other, {}, {name: _defaults_of(group) for name, group in GROUPS.items()})


def _filled(recorded: Any, other: Any, defaults: Mapping[str, Any], groups: Mapping[str, Any]) -> Any:
    """Return a recorded value with the options that it lacks.

    defaults  option -> its default, of this value
    groups    name in this value -> the defaults of that group
    """
    if isinstance(recorded, list) and isinstance(other, list) and len(recorded) == len(other):
        return [_filled(*pair, {}, {}) for pair in zip(recorded, other, strict=True)]
    if not (isinstance(recorded, Mapping) and isinstance(other, Mapping)):
        return recorded
    if "class_path" in recorded:
        groups = {"init_args": _defaults_of(_class_at(recorded["class_path"]))}
    later = {name: defaults[name] for name in other if name in defaults and name not in recorded}
    return later | {name: _filled(x, other.get(name), groups.get(name, {}), {}) for name, x in recorded.items()}


def _class_at(path: str) -> type[Component]:
    """Return the component class of an import path; Component itself, which has no options, if it is not imported."""
    classes: list[type[Component]] = [Component]
    for cls in classes:
        classes += cls.__subclasses__()
    # the last one of a notebook that has made a class again
    return next((cls for cls in reversed(classes) if f"{cls.__module__}.{cls.__qualname__}" == path), Component)


def _defaults_of(owner: type) -> dict[str, Any]:
    """Return option -> default of a group or a component class, as plain values."""
    options = options_of(owner).values()
    return {option.name: plain(option.default) for option in options if option.default is not option.empty}
