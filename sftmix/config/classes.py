"""Component classes by short name or import path: found, or one sentence that says why not and what to write."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Sequence
from typing import Any

from sftmix.common.errors import ConfigError, nearest, told
from sftmix.components.base import Component
from sftmix.config.schema import all_components, component_bases, component_options, import_class, known_components


def find_class(path: str, base: type[Component] = Component) -> Any:
    """Return the object at an import path; raise ConfigError, with the nearest component of that kind in its module."""
    try:
        return import_class(path)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"no {base.__name__} {path!r}: {error}.{nearest(path, _components_in(path, base))}"
        ) from error


def _components_in(path: str, base: type[Component]) -> list[str]:
    """List the import paths of the components of a kind that the module of a path defines."""
    try:
        module = importlib.import_module(path.rpartition(".")[0])
    except (ImportError, ValueError, SyntaxError):
        return []
    found = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base)]
    return [f"{c.__module__}.{c.__qualname__}" for c in found if c.__module__ == module.__name__]


def why_not(base: type[Component], name: str, more: Sequence[str] = ()) -> str | None:
    """Return the reason why a name chooses no component of a kind, and what to write; None if it chooses one.

    more  words that the option takes beside components
    """
    known = [*known_components(base), *more]
    listed = f"there are {', '.join(known)}, or the import path of your own class (my_module.MyClass)"
    if "." not in name:
        if name in all_components(base):
            return None
        return told(f"no {base.__name__} {name!r}", nearest(name, known), listed)
    try:
        found = find_class(name, base)
    except ConfigError as error:
        if str(error).endswith("?"):
            return str(error)
        return told(str(error).removesuffix("."), nearest(name.rpartition(".")[2], known), listed)
    if not inspect.isclass(found):  # a function may make one
        found = typing.get_type_hints(found).get("return") if callable(found) else None
    return _no_subclass(base, name, found) or _unfinished(name, found)


def _no_subclass(base: type[Component], name: str, found: Any) -> str | None:
    if inspect.isclass(found) and issubclass(found, base):
        return None
    kinds = component_bases().items()
    other = [(field, kind) for field, kind in kinds if inspect.isclass(found) and issubclass(found, kind)]
    takes = "".join(f"; it is of the kind {kind.__name__}, for --{field}" for field, kind in other)
    return f"{name} is no subclass of sftmix.components.{base.__name__}{takes}"


def _unfinished(name: str, found: type) -> str | None:
    """Return the reason why no object of the class can be made from options."""
    if inspect.isabstract(found):
        methods = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        return f"{name} is abstract: it lacks {methods}, which a subclass of its kind defines"
    for option, parameter in component_options(found).items():
        if parameter.annotation is parameter.default is inspect.Parameter.empty:
            return f"{name} needs {option}, to which its __init__ gives no type; write `{option}: int`, or what it is"
    return None
