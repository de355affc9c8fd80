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
from types import ModuleType


class _WorkingDirectory(MetaPathFinder):
    """The last place where Python looks for a module, so that a file there shadows no package.

    found  names of the modules that were looked for and are there
    """

    def __init__(self) -> None:
        self.found: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, [os.getcwd()]) if path is None else None
        if spec is not None:
            self.found.add(fullname)
        return spec


@contextmanager
def own_modules() -> Iterator[None]:
    """Search the working directory, too, while classes that options name are imported.

    After a class was found there, the directory stays at the end of sys.path: its module may import others beside it
    when it runs.
    """
    directory = _WorkingDirectory()
    sys.meta_path.append(directory)
    try:
        yield
    finally:
        sys.meta_path.remove(directory)
        if directory.found & sys.modules.keys():  # imported from there, and not looked for alone
            sys.path.append(os.getcwd())
