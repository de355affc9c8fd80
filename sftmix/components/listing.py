"""The shipped components by base class, found in their modules, as `cli.py components` prints them."""

import importlib
import inspect
import pkgutil
from functools import cache
from typing import NamedTuple

from sftmix.components.component import Component, import_path


class Shipped(NamedTuple):
    """One component: its short name, import path and first docstring line."""

    name: str
    path: str
    doc: str


@cache
def catalogue() -> list[tuple[str, list[Shipped]]]:
    """Return (base class name, its shipped components), in the order of the modules' names."""
    package = importlib.import_module("sftmix.components")
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    # the paper's before those of others, as lists show them
    names = sorted((module.name for module in found), key=lambda name: (".others" in name, name))
    modules = [importlib.import_module(name) for name in names]
    classes = [c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__]
    bases = [c for c in classes if Component in c.__bases__]  # Schedule, but no StageState or subclass of a base
    whole = [c for c in classes if c not in bases and not inspect.isabstract(c)]
    return [(b.__name__, [as_shipped(c) for c in whole if issubclass(c, b)]) for b in bases]


def as_shipped(cls: type) -> Shipped:
    """Return a component's entry in the list."""
    return Shipped(cls.__name__, import_path(cls), (inspect.getdoc(cls) or "").partition("\n")[0])
