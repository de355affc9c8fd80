"""Component classes by short name or import path, and where those of the user's own are looked for.

The working directory is searched for classes that options name, and for nothing else. Libraries look for optional
packages when they are imported: a directory from elsewhere could hold a file of such a name, and it would run if the
directory were always searched.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from sftmix.common.errors import ConfigError, nearest, told
from sftmix.components.base import Component
from sftmix.components.listing import catalogue


class _WorkingDirectory(MetaPathFinder):
    """The last place where Python looks for a module, so that a file there shadows no package.

    outside  None, or the directory in which no module is found, nor in a package around it
    found    names of the modules that were looked for and are there
    """

    def __init__(self, outside: Path | None) -> None:
        self.outside = None if outside is None else outside.resolve()
        self.found: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, [os.getcwd()]) if path is None else None
        if spec is None or (self.outside is not None and self._touches(spec, self.outside)):
            return None
        self.found.add(fullname)
        return spec

    def _touches(self, spec: ModuleSpec, outside: Path) -> bool:
        """Return True for a module in the directory, and for a package in or around it."""
        packages = [Path(place).resolve() for place in spec.submodule_search_locations or ()]
        places = packages or [Path(spec.origin or "").parent.resolve()]
        return any(outside.is_relative_to(p) for p in packages) or any(p.is_relative_to(outside) for p in places)


@contextmanager
def own_modules(*, outside: Path | None = None) -> Iterator[None]:
    """Search the working directory, too, while classes that options name are imported.

    After a class was found there, the directory stays at the end of sys.path: its module may import others beside it
    when it runs.

    outside  a run directory, whose author may be anyone: nothing in it is imported. It holds for the whole block.
    """
    if any(isinstance(finder, _WorkingDirectory) for finder in sys.meta_path):
        yield
        return
    directory = _WorkingDirectory(outside)
    sys.meta_path.append(directory)
    try:
        yield
    finally:
        sys.meta_path.remove(directory)
        if directory.found & sys.modules.keys():  # imported from there, and not looked for alone
            sys.path.append(os.getcwd())


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


def chosen_by(cls: type) -> str:
    """Return the name by which an option finds a class in a process that has not imported it."""
    shipped = cls.__module__.startswith("sftmix.components.")
    return cls.__name__ if shipped else f"{cls.__module__}.{cls.__qualname__}"


def known_components(base: type[Component]) -> dict[str, type[Component]]:
    """Return name -> class for every imported concrete subclass of a base class, shipped ones first.

    The name is one that an option takes: the short name of a shipped class, the import path of any other.
    """
    catalogue()  # which imports the shipped ones
    known: dict[str, type[Component]] = {}
    pending = list(base.__subclasses__())
    while pending:
        cls = pending.pop(0)
        pending += cls.__subclasses__()
        internal = cls.__module__.startswith("sftmix.") and not cls.__module__.startswith("sftmix.components.")
        if not (internal or inspect.isabstract(cls) or cls.__name__.startswith("_")):
            known.setdefault(chosen_by(cls), cls)
    return known


def listed(base: type[Component], words: Sequence[str] = ()) -> str:
    """List the components of a kind for a message; `words` are what an option takes beside them."""
    return ", ".join([*known_components(base), *words, "or the import path of your own class (my_module.MyClass)"])


def find_component(base: type[Component], name: str, key: str = "", words: Sequence[str] = ()) -> type[Component]:
    """Return the class of a kind that a name chooses; raise ConfigError that says why it chooses none.

    key    the option, for messages
    words  what the option takes beside components
    """
    where, reason = f"{key}: " if key else "", ""
    cls: Any = known_components(base).get(name)
    if cls is None and "." in name:
        try:
            cls = import_class(name)
        except (ImportError, AttributeError, ValueError, SyntaxError) as error:
            reason = f": {error}"
    if cls is None:
        near = [*known_components(base), *words]  # with those of a module that was imported just now
        guess = nearest(name, near) or nearest(name.rpartition(".")[2], near)
        problem = f"{where}no {base.__name__} {name!r}{reason}"
        raise ConfigError(told(problem, guess, f"there are {listed(base, words)}"))
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise ConfigError(f"{where}{name} is no subclass of sftmix.components.{base.__name__}")
    if inspect.isabstract(cls):
        methods = ", ".join(sorted(cls.__abstractmethods__))
        raise ConfigError(f"{where}{name} is abstract: it lacks {methods}, which a subclass of its kind defines")
    return cls
