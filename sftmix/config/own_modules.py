"""Modules of the user's own: the working directory is searched for classes that options name, and for nothing else.

Libraries look for optional packages when they are imported. A directory from elsewhere could hold a file of such a
name, and it would run if the directory were always searched.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


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
        if spec is None or not self._takes(spec):
            return None
        self.found.add(fullname)
        return spec

    def _takes(self, spec: ModuleSpec) -> bool:
        if self.outside is None:
            return True
        packages = [Path(place).resolve() for place in spec.submodule_search_locations or ()]
        if any(self.outside.is_relative_to(package) for package in packages):
            return False
        places = packages or [Path(spec.origin or "").parent.resolve()]
        return not any(place.is_relative_to(self.outside) for place in places)


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
