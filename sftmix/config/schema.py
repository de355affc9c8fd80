"""The types of all options: of those of the tree by their full keys (`training.epochs`), and of components."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.components.base import Component
from sftmix.components.listing import catalogue
from sftmix.config.own_modules import own_modules
from sftmix.config.run_config import RunConfig

type_hints = cache(typing.get_type_hints)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type hint: `list[str] | None` -> list[str], NoneType; `int` -> int."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def group_in(hint: Any) -> type | None:
    """Return the group of options, a dataclass, in a type hint: `LoraOptions | None` -> LoraOptions; or None."""
    return next((kind for kind in alternatives(hint) if dataclasses.is_dataclass(kind)), None)  # type: ignore[return-value]


def component_in(hint: Any) -> type[Component] | None:
    """Return the base class of the component in a type hint: `PairSampler | None` -> PairSampler; or None.

    That of a list of components counts, too.
    """
    kinds = [inner for kind in alternatives(hint) for inner in (kind, *typing.get_args(kind))]
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, Component)), None)


def is_list(hint: Any) -> bool:
    """Return True for options that take several values: `--data.train a --data.train+ b`."""
    return any(typing.get_origin(kind) is list for kind in alternatives(hint))


@cache
def component_bases() -> dict[str, type[Component]]:
    """Return field -> base class for the fields of RunConfig that hold components."""
    return {name: base for name, hint in type_hints(RunConfig).items() if (base := component_in(hint))}


@cache
def nested_bases() -> dict[str, type[Component]]:
    """Return option -> base class for options of shipped components that take a component (`objective.mu`)."""
    places: dict[type[Component], str] = {}
    for field, base in component_bases().items():
        for shipped in dict(catalogue())[base.__name__]:
            for name, option in component_options(import_class(shipped.path)).items():
                if inner := component_in(option.annotation):
                    places.setdefault(inner, f"{field}.{name}")
    return {place: base for base, place in places.items()}


@cache
def option_groups() -> dict[str, type]:
    """Return field -> dataclass for the fields of RunConfig that are groups of options (`data`)."""
    return {name: group for name, hint in type_hints(RunConfig).items() if (group := group_in(hint))}


@cache
def option_hints() -> dict[str, Any]:
    """Return full key -> type of every option outside components, in the order of the tree."""
    return dict(_hints_of(RunConfig, ""))


def _hints_of(group: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in type_hints(group).items():
        if inner := group_in(hint):
            yield from _hints_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def list_options() -> set[str]:
    """Return the options that take several values."""
    return {key for key, hint in option_hints().items() if is_list(hint)}


def is_flag(key: str) -> bool:
    """Return True if the option is true or false, so that its name alone means true."""
    if key in option_hints():
        return option_hints()[key] is bool
    field, _, name = key.partition(".")
    base = component_bases().get(field)
    classes = known_components(base).values() if base else ()
    return any(name in options and options[name].annotation is bool for options in map(component_options, classes))


def component_options(cls: Any) -> dict[str, inspect.Parameter]:
    """Return the options of a component class: its constructor's parameters, with their types resolved.

    A parameter without a type keeps `inspect.Parameter.empty`. Raises ConfigError if a type cannot be resolved.
    """
    if inspect.isclass(cls) and cls.__init__ is object.__init__:
        return {}
    made_by: Callable[..., Any] = cls.__init__ if inspect.isclass(cls) else cls
    try:
        hints = type_hints(made_by)
    except (NameError, AttributeError, TypeError) as error:
        named = f"{cls.__module__}.{cls.__qualname__}"
        raise ConfigError(f"the types in {named}.__init__ cannot be read, and they are its options: {error}") from error
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind in kinds]
    return {p.name: p.replace(annotation=hints.get(p.name, p.empty)) for p in parameters}


def import_class(path: str) -> type:
    """Import the class at an import path; the working directory is searched for it last."""
    path = path.replace("sftmix.trackers.", "sftmix.tools.trackers.")  # as older configurations say
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

    def may_be_chosen(cls: type) -> bool:
        internal = cls.__module__.startswith("sftmix.") and not cls.__module__.startswith("sftmix.components.")
        return not (internal or inspect.isabstract(cls) or cls.__name__.startswith("_"))

    return {chosen_by(cls): cls for cls in all_components(base).values() if may_be_chosen(cls)}


def chosen_by(cls: type) -> str:
    """Return the name by which an option finds a class in a process that has not imported it."""
    shipped = cls.__module__.startswith("sftmix.components.")
    return cls.__name__ if shipped else f"{cls.__module__}.{cls.__qualname__}"


def all_components(base: type[Component]) -> Mapping[str, type[Component]]:
    """Return short name -> class for every imported subclass of a base class, abstract and private ones too."""
    catalogue()  # which imports the shipped ones
    classes: dict[str, type[Component]] = {}
    pending = list(base.__subclasses__())
    while pending:
        cls = pending.pop(0)
        pending += cls.__subclasses__()
        classes.setdefault(cls.__name__, cls)
    return classes
