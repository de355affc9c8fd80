"""Component classes by short name or import path: found, or one sentence that says why not and what to write."""

from __future__ import annotations

import inspect
import sys
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
        module = path.rpartition(".")[0]
        there = vars(sys.modules[module]) if module in sys.modules else {}
        kinds = [f"{module}.{n}" for n, c in there.items() if inspect.isclass(c) and issubclass(c, base)]
        raise ConfigError(f"no {base.__name__} {path!r}: {error}.{nearest(path, kinds)}") from error


def find_component(base: type[Component], name: str, words: Sequence[str] = ()) -> type[Component]:
    """Return the class of a kind that a name chooses; raise ConfigError that says why it chooses none.

    words  what the option takes beside components
    """
    if "." not in name and name in all_components(base):
        cls: Any = all_components(base)[name]
    else:
        cls = _imported(base, name, [*known_components(base), *words])
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        kinds = [
            (field, kind) for field, kind in component_bases().items() if inspect.isclass(cls) and issubclass(cls, kind)
        ]
        other = "".join(f"; it is of the kind {kind.__name__}, for --{field}" for field, kind in kinds)
        raise ConfigError(f"{name} is no subclass of sftmix.components.{base.__name__}{other}")
    if inspect.isabstract(cls):
        methods = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        raise ConfigError(f"{name} is abstract: it lacks {methods}, which a subclass of its kind defines")
    for option, parameter in component_options(cls).items():
        if parameter.annotation is parameter.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{name} needs {option}, to which its __init__ gives no type; write `{option}: int`, or what it is"
            )
    return cls


def _imported(base: type[Component], name: str, known: Sequence[str]) -> Any:
    listed = f"there are {', '.join(known)}, or the import path of your own class (my_module.MyClass)"
    if "." not in name:
        raise ConfigError(told(f"no {base.__name__} {name!r}", nearest(name, known), listed))
    try:
        return find_class(name, base)
    except ConfigError as error:
        if str(error).endswith("?"):  # a component of that module is near
            raise
        raise ConfigError(
            told(str(error).removesuffix("."), nearest(name.rpartition(".")[2], known), listed)
        ) from error
