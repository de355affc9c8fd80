"""The options of the tree and of components, with types and defaults: the fields of dataclasses, and constructors."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from functools import cache
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.components.base import Component
from sftmix.config.run_config import RunConfig


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


_type_hints = cache(typing.get_type_hints)


def options_of(owner: Any) -> dict[str, inspect.Parameter]:
    """Return the options of a group or of a component class: its constructor's parameters, with their types resolved.

    A parameter without a type keeps `inspect.Parameter.empty`. Raises ConfigError if a type cannot be resolved.
    """
    if owner.__init__ is object.__init__:
        return {}
    try:
        hints = _type_hints(owner.__init__)
    except (NameError, AttributeError, TypeError) as error:
        named = f"{owner.__module__}.{owner.__qualname__}"
        raise ConfigError(f"the types in {named}.__init__ cannot be read, and they are its options: {error}") from error
    fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
    defaults = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    named_kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {
        p.name: p.replace(annotation=hints.get(p.name, p.empty), default=defaults.get(p.name, p.default))
        for p in inspect.signature(owner).parameters.values()
        if p.kind in named_kinds
    }


@cache
def option_hints(group: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Return full key -> type of every option outside components, in the order of the tree."""
    hints: dict[str, Any] = {}
    for name, option in options_of(group).items():
        inner = group_in(option.annotation)
        hints |= option_hints(inner, f"{prefix}{name}.") if inner else {f"{prefix}{name}": option.annotation}
    return hints


@cache
def component_bases() -> dict[str, type[Component]]:
    """Return field -> base class for the fields of RunConfig that hold components."""
    return {name: base for name, o in options_of(RunConfig).items() if (base := component_in(o.annotation))}
