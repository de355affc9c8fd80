"""`components`: what can be swapped, and the options of one component."""

from __future__ import annotations

import argparse
import inspect

from sftmix.cli.help import formatted, option_rows
from sftmix.components.base import Component
from sftmix.components.listing import as_shipped, catalogue
from sftmix.config.schema import chosen_by, component_bases, component_in, find_component, import_class, options_of

ABOUT = """List the components that can be swapped, one line each by the option that chooses them.
With a name, show one with its options.

  sftmix components
  sftmix components SFTMix"""


def main(args: argparse.Namespace) -> None:
    """Print the list or the one component."""
    print(details(args.name) if args.name else overview(), end="")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a component")


def nested_bases() -> dict[str, type[Component]]:
    """Return option -> base class for kinds that only options of shipped components take (`objective.mu`)."""
    bases, nested = component_bases(), dict[str, type[Component]]()
    for field, base in bases.items():
        for shipped in dict(catalogue())[base.__name__]:
            for name, option in options_of(import_class(shipped.path)).items():
                inner = component_in(option.annotation)
                if inner and inner not in (*bases.values(), *nested.values()):
                    nested[f"{field}.{name}"] = inner
    return nested


def overview() -> str:
    """List every component under the option that chooses it, one line each."""
    lines, shipped = [], dict(catalogue())
    for option, base in (component_bases() | nested_bases()).items():
        lines.append(f"--{option}  ({base.__name__}: {as_shipped(base).doc})")
        lines += [f"  {component.name:<20} {component.doc}" for component in shipped[base.__name__]]
        lines.append("")
    more = "`components NAME` shows one with its options. Your own: subclass the base class, choose it by import path."
    return "\n".join([*lines, more]) + "\n"


def details(name: str) -> str:
    """Describe a component: its docstring, its import path and its options; all shipped components of a short name."""
    paths = [component.path for _, components in catalogue() for component in components if component.name == name]
    classes = [import_class(path) for path in paths] or [find_component(Component, name)]
    places, texts = component_bases() | nested_bases(), []
    for cls in classes:
        for option, base in places.items():
            if issubclass(cls, base):
                title = f"{cls.__name__}  ({as_shipped(cls).path}), chosen by --{option} {chosen_by(cls)}"
                about = f"{title}\n\n{inspect.getdoc(cls) or ''}"
                rows = {"options": option_rows(cls, f"{option}.")}
                texts.append(formatted(rows, usage=argparse.SUPPRESS, description=about))
    return "\n".join(texts)
