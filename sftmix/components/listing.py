"""The shipped components by base class, found in their modules, as `sftmix components` prints them."""

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
    found = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    # the paper's before those of others, as lists show them
    modules = map(importlib.import_module, sorted(found, key=lambda name: (".others" in name, name)))
    classes = [c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__]
    whole = [c for c in classes if not inspect.isabstract(c)]
    bases = [c for c in classes if Component in c.__bases__]  # Schedule, but no StageState or subclass of a base
    return [(b.__name__, [as_shipped(c) for c in whole if issubclass(c, b) and c is not b]) for b in bases]


def as_shipped(cls: type) -> Shipped:
    """Return a component's entry in the list."""
    return Shipped(cls.__name__, import_path(cls), (inspect.getdoc(cls) or "").partition("\n")[0])
