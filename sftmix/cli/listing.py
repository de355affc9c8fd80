"""`components`: the list of components, and one component with its options."""

from __future__ import annotations

import inspect

from sftmix.cli.option_lines import component_lines, option_lines
from sftmix.common.errors import ConfigError, nearest, told
from sftmix.components.listing import Shipped, as_shipped, catalogue
from sftmix.config.classes import find_class
from sftmix.config.schema import chosen_by, component_bases, import_class, nested_bases


def _by_option() -> list[tuple[str, type, list[Shipped]]]:
    """Return (option, base class, shipped components) of every kind of component."""
    shipped, options = dict(catalogue()), component_bases() | nested_bases()
    return [(option, base, shipped.get(base.__name__, [])) for option, base in options.items()]


def overview() -> str:
    """List every component under the option that chooses it, one line each."""
    parts = []
    for option, base, shipped in _by_option():
        title = f"--{option}  ({base.__name__}: {(inspect.getdoc(base) or '').partition(chr(10))[0]})"
        parts.append("\n".join([title, *(f"  {component.name:<20} {component.doc}" for component in shipped)]))
    more = "`components NAME` shows one with its options. Your own: subclass the base class, choose it by import path."
    return "\n\n".join([*parts, more]) + "\n"


def details(name: str) -> str:
    """Describe a component: its docstring, its import path and its options; all components of that name, if several.

    name  the short name of a shipped component, or any import path
    """
    every = [(option, component) for option, _, shipped in _by_option() for component in shipped]
    found = [_describe(option, component) for option, component in every if component.name == name]
    if "." in name:
        cls, kinds = find_class(name), [(option, base) for option, base, _ in _by_option()]
        found = [_describe(o, as_shipped(cls)) for o, base in kinds if inspect.isclass(cls) and issubclass(cls, base)]
        if not found:
            listed = ", ".join(base.__name__ for _, base in kinds)
            raise ConfigError(f"{name} is no component: no subclass of a base class in sftmix.components ({listed})")
    if not found:
        names = list(dict.fromkeys(component.name for _, component in every))
        raise ConfigError(told(f"no component {name!r}", nearest(name, names), f"there are {', '.join(names)}"))
    return "\n\n".join(found) + "\n"


def _describe(option: str, component: Shipped) -> str:
    cls = import_class(component.path)
    text = [f"{component.name}  ({component.path}), chosen by --{option} {chosen_by(cls)}", ""]
    text += [*(inspect.getdoc(cls) or "").splitlines(), ""]
    return "\n".join([*text, *option_lines(list(component_lines(option, cls)))]).rstrip()
