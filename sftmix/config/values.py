"""A plain value of YAML, or a word of the command line -> a value of an option's type."""

from __future__ import annotations

import collections.abc
import inspect
import types
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin

from sftmix.config.schema import alternatives

_LISTS = (list, tuple, collections.abc.Sequence)


class NoValueError(Exception):
    """A value that a type does not allow; of a list it is the first item that is not allowed."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.value = value


def converted(value: Any, hint: Any) -> Any:
    """Return a plain value as the type hint has it; a text may spell any value, as on the command line.

    Of several types that would take a text, words and numbers come before lists, and text comes last. Raises
    NoValueError.
    """
    if hint in (Any, inspect.Parameter.empty):
        return from_yaml(value)
    for kind in sorted(alternatives(hint), key=_rank):
        with suppress(ValueError):
            return _as(kind, value)
    raise NoValueError(value)


def from_yaml(value: Any) -> Any:
    """Return what a text is to YAML, or the text itself if it is nothing else; any other value as it is."""
    import yaml

    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def _rank(kind: Any) -> int:
    order = (types.NoneType, bool, int, float)
    return -1 if get_origin(kind) is Literal else len(order) + (kind is str) if kind not in order else order.index(kind)


def _as(kind: Any, value: Any) -> Any:
    """Return the value as one type without alternatives; raise ValueError, or NoValueError of an item of a list."""
    origin, inside = get_origin(kind) or kind, get_args(kind)
    if origin is Literal and value in inside:
        return value
    if kind is types.NoneType and value in (None, "null", "~"):
        return None
    if kind is bool and isinstance(from_yaml(value), bool):
        return from_yaml(value)
    if kind in (int, float):
        number = from_yaml(value)
        if type(number) in (str, int, kind):  # 1e-4 is a text to YAML, since it has no point
            return kind(number)
    if kind is str and isinstance(value, str):
        return value
    if origin in (*_LISTS, dict):
        return _collection(origin, inside, from_yaml(value))
    raise ValueError


def _collection(origin: Any, inside: Sequence[Any], value: Any) -> Any:
    if origin is dict and isinstance(value, dict):
        of_keys, of_values = inside or (Any, Any)
        return {converted(key, of_keys): converted(item, of_values) for key, item in value.items()}
    if origin in _LISTS and isinstance(value, (list, tuple)):
        if origin is tuple and inside[1:] != (...,):
            if len(inside) != len(value):
                raise ValueError
            return tuple(converted(item, kind) for item, kind in zip(value, inside, strict=True))
        return [converted(item, inside[0] if inside else Any) for item in value]
    raise ValueError
