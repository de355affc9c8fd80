"""Base classes and shipped components, for users to swap; each is imported on first use.

Their only list is the imports in `__init__.pyi`, which type checkers read. Three components are named `FromFile`:
dynamics, scores or a split from a file. `--reference FromFile`, `--confidence FromFile` and `--splitter FromFile` each
find theirs; in Python they are in the modules `reference`, `confidence` and `splitters`.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

# from sftmix.components.pairing import RandomPairs as RandomPairs -> {"RandomPairs": "sftmix.components.pairing"}
_LISTED = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
_MODULES = {name.name: line.module for line in _LISTED if isinstance(line, ast.ImportFrom) for name in line.names}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(str(_MODULES[name])), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
