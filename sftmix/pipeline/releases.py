"""Inputs of a stage that another release recorded, completed with the options that it did not have.

An option that comes with a release has a default that does what was done before, so recorded inputs without the option
are those of its default. A release that changes what an option, a default or a stage does raises the stage's `version`
(`StageSpec`), by which earlier directories of the stage are refused.
"""

from collections.abc import Mapping
from typing import Any

from sftmix.components.component import Component, import_path, to_builtin
from sftmix.config.schema import group_in, imported_classes, options_of
from sftmix.options.data import DataOptions
from sftmix.options.model import LoraOptions
from sftmix.options.training import TrainingOptions

GROUPS = {"data": DataOptions, "lora": LoraOptions, "training": TrainingOptions}
"""Input of a stage -> the group of options that it holds."""


def completed(recorded: Any, other: Any) -> Any:
    """Return the recorded inputs of a stage with each option that they lack and the other ones have, at its default.

    Options are those of GROUPS and of components, with the groups in them. An input that is no option has no default:
    if one side lacks it, the inputs differ. A recorded option that no class here has differs as well.
    """
    return _filled(recorded, other, {}, GROUPS)


def _filled(recorded: Any, other: Any, defaults: Mapping[str, Any], groups: Mapping[str, type]) -> Any:
    """Return a recorded value with the options that it lacks.

    defaults  option -> its default, of this value
    groups    name in this value -> the group, or the component class, whose options are there
    """
    if isinstance(recorded, list) and isinstance(other, list) and len(recorded) == len(other):
        return [_filled(*pair, {}, {}) for pair in zip(recorded, other, strict=True)]
    if not (isinstance(recorded, Mapping) and isinstance(other, Mapping)):
        return recorded
    if "class_path" in recorded:
        groups = {"init_args": _class_at(recorded["class_path"])}
    later = {name: defaults[name] for name in other if name in defaults and name not in recorded}
    return later | {name: _of_owner(x, other.get(name), groups.get(name)) for name, x in recorded.items()}


def _of_owner(recorded: Any, other: Any, owner: type | None) -> Any:
    """Return a recorded value with the options of its owner that it lacks; None: it is no owner's."""
    options = options_of(owner) if owner else {}
    given = {name: option.default for name, option in options.items() if option.default is not option.empty}
    groups = {name: group for name, option in options.items() if (group := group_in(option.annotation))}
    return _filled(recorded, other, to_builtin(given), groups)


def _class_at(path: str) -> type[Component]:
    """Return the component class of an import path; Component itself, which has no options, if it is not imported."""
    classes = reversed(imported_classes(Component))  # the last one of a notebook that has made a class again
    return next((cls for cls in classes if import_path(cls) == path), Component)
