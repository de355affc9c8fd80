"""All options by their full keys (`training.epochs`), with their types and the components they take."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.components.base import Component
from sftmix.components.listing import catalogue
from sftmix.config.own_modules import own_modules
from sftmix.config.run_config import RunConfig


@cache
def load_shipped() -> None:
    """Import the shipped components, since a short name finds imported classes only."""
    catalogue()


def _classes_in(hint: object) -> Iterator[type]:
    """Yield the classes in a type hint: `PairSampler | None` -> PairSampler, NoneType."""
    if inspect.isclass(hint) and not typing.get_args(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from _classes_in(argument)


def component_classes(hint: object) -> list[type[Component]]:
    """List the component classes in a type hint."""
    return [found for found in _classes_in(hint) if issubclass(found, Component)]


@cache
def component_bases() -> dict[str, type[Component]]:
    """Return field -> base class for the fields of RunConfig that hold components."""
    hints = typing.get_type_hints(RunConfig)
    found = {name: component_classes(hint) for name, hint in hints.items()}
    return {name: bases[0] for name, bases in found.items() if bases}


@cache
def nested_bases() -> dict[str, type[Component]]:
    """Return option -> base class for options of shipped components that take a component (`objective.mu`)."""
    found: dict[type[Component], str] = {}
    for field, base in component_bases().items():
        for shipped in dict(catalogue())[base.__name__]:
            for name, option in component_options(import_class(shipped.path)).items():
                for nested in component_classes(option.annotation):
                    found.setdefault(nested, f"{field}.{name}")
    return {place: base for base, place in found.items()}


@cache
def option_groups() -> dict[str, type]:
    """Return field -> dataclass for the fields of RunConfig that are groups of options (`data`)."""
    hints = typing.get_type_hints(RunConfig).items()
    return {name: hint for name, hint in hints if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


@cache
def option_hints() -> dict[str, Any]:
    """Return full key -> type of every option outside components, in the order of the tree."""
    return dict(_hints_of(RunConfig, ""))


def is_group(key: str) -> bool:
    """Return True if the key is a group of options: `data`, `model.lora`."""
    return any(option.startswith(f"{key}.") for option in option_hints())


def _hints_of(group: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, type) of the options of a group and of the groups inside it (`model.lora.r`)."""
    for name, hint in typing.get_type_hints(group).items():
        if dataclasses.is_dataclass(hint):
            yield from _hints_of(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def single_as_list(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with a single component, where several may stand, in a list: `callbacks: Evaluate`."""
    several = list_options() & component_bases().keys()
    return {k: [v] if k in several and isinstance(v, (str, Mapping)) else v for k, v in values.items()}


def list_options() -> set[str]:
    """Return the options that take several values: `--data.train a --data.train+ b`."""
    return {k for k, hint in option_hints().items() if list in (typing.get_origin(h) for h in alternatives(hint))}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type hint: `list[str] | None` -> list[str], NoneType; `int` -> int."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def is_flag(key: str) -> bool:
    """Return True if the option is true or false, so that its name alone means true."""
    field, _, name = key.partition(".")
    if key in option_hints():
        return option_hints()[key] is bool
    if field not in component_bases():
        return False
    classes = known_components(component_bases()[field]).values()
    return any(name in options and options[name].annotation is bool for options in map(component_options, classes))


def component_options(cls: Any) -> dict[str, inspect.Parameter]:
    """Return the options of a component class: its constructor's parameters, with their types resolved.

    A parameter without a type keeps `inspect.Parameter.empty`. Raises ConfigError if a type cannot be resolved.
    """
    if cls.__init__ is object.__init__:
        return {}
    try:
        hints = typing.get_type_hints(cls.__init__)
    except (NameError, AttributeError, TypeError) as error:
        named = f"{cls.__module__}.{cls.__qualname__}"
        raise ConfigError(f"the types in {named}.__init__ cannot be read, and they are its options: {error}") from error
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p.replace(annotation=hints.get(p.name, p.empty)) for p in parameters if p.kind in kinds}


def import_class(path: str) -> type:
    """Import the class at an import path; the working directory is searched for it last."""
    module, _, name = path.rpartition(".")
    try:
        with own_modules():
            owner = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module or "." not in module:
            raise
        return getattr(import_class(module), name)  # a class inside a class
    return getattr(owner, name)


def known_components(base: type[Component]) -> dict[str, type[Component]]:
    """Return name -> class for every imported concrete subclass of a base class, shipped ones first.

    The name is one that an option takes: the short name of a shipped class, the import path of any other.
    """
    found = [cls for cls in all_components(base).values() if not inspect.isabstract(cls) and _may_be_chosen(cls)]
    return {chosen_by(cls): cls for cls in found}


def chosen_by(cls: type) -> str:
    """Return the name by which an option finds a class in a process that has not imported it."""
    shipped = cls.__module__.startswith("sftmix.components.")
    return cls.__name__ if shipped else f"{cls.__module__}.{cls.__qualname__}"


def _may_be_chosen(cls: type[Component]) -> bool:
    """Return False for names with an underscore, and for classes of this package that it makes itself."""
    internal = cls.__module__.startswith("sftmix.") and not cls.__module__.startswith("sftmix.components.")
    return not internal and not cls.__name__.startswith("_")


def all_components(base: type[Component]) -> dict[str, type[Component]]:
    """Return short name -> class for every imported subclass of a base class, abstract and private ones too."""
    load_shipped()
    found: dict[str, type[Component]] = {}
    pending = list(base.__subclasses__())
    while pending:
        cls = pending.pop(0)
        pending += cls.__subclasses__()
        found.setdefault(cls.__name__, cls)
    return found
