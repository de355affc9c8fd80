"""Values as JSON and YAML have them: what notebooks hand over becomes plain once, where an option is set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sftmix.common.shown import quoted

PLAIN: tuple[type, ...] = (bool, int, float, str, type(None))
"""The types of a single plain value. YAML writes no class made from one of them, such as numpy's float64."""


@dataclass
class PlainFields:
    """A group of options: whenever one is set, a number of numpy becomes Python's own, and a path text."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, plain_value(value, paths=True))


def plain_value(value: Any, *, paths: bool = False) -> Any:
    """Return numbers and text of numpy as Python's own, in lists, tuples and dictionaries, too; all else as it is.

    A container that holds nothing else is returned itself, as who made it may still add to it.
    paths  paths become text, relative as they are given
    """
    if _of_numpy(value) and value.ndim == 0:
        return value.item()
    if type(value) in (list, tuple):
        made = type(value)(plain_value(inner, paths=paths) for inner in value)
        return value if _same(made, value) else made
    if type(value) is dict:
        changed = {plain_value(k, paths=paths): plain_value(v, paths=paths) for k, v in value.items()}
        return value if _same(changed, value) and _same(changed.values(), value.values()) else changed
    return os.fspath(value) if paths and isinstance(value, os.PathLike) else value


def _of_numpy(value: Any) -> bool:
    """Return True for numbers and arrays of numpy, which is not imported: options are read without it, too."""
    return type(value).__module__ == "numpy" and hasattr(value, "dtype")


def _same(made: Iterable[Any], given: Iterable[Any]) -> bool:
    return all(new is old for new, old in zip(made, given, strict=True))


def not_plain(key: str, value: object) -> str:
    """Return the sentence that refuses an option's value, which no file of a run could hold."""
    kind = type(value)
    named = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    allowed = "a configuration holds numbers, text, true, false, None, and lists and dictionaries of these"
    shown = " ".join(quoted(value).split())
    return f"{key} is {shown}, of the type {named}; {allowed}. {_remedy(value)}"


def _remedy(value: Any) -> str:
    for kind, name in ((str, "str"), (os.PathLike, "str"), (int, "int"), (float, "float")):
        if isinstance(value, kind):
            return f"Give {name}() of it"
    if hasattr(value, "tolist"):  # arrays, tensors, series
        single = getattr(value, "ndim", 1) == 0
        if single and _of_numpy(value) and value.dtype.kind == "f":  # a longdouble, whose item() is itself
            return "Give float() of it"
        return "Give its .item()" if single else "Give its .tolist()"
    if isinstance(value, Mapping):
        return "Give dict() of it"
    return "Give list() of it" if isinstance(value, Iterable) else "Give the value as one of these"
