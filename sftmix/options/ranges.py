"""Options out of their range, in words."""

from collections.abc import Callable, Iterator
from typing import Any

Check = tuple[str, Callable[[Any], bool], str]
"""Name of an option, a test that is True for allowed values, and the allowed values in words."""


def out_of_range(prefix: str, options: object, checks: tuple[Check, ...]) -> Iterator[str]:
    """Yield one sentence for each option that is set (not None) and out of its range."""
    for name, allowed, words in checks:
        value = getattr(options, name, None)
        if value is not None and not allowed(value):  # nan is not: no comparison holds for it
            yield f"{prefix}.{name} is {value!r}; allowed: {words}"


def at_least_1(value: int) -> bool:
    return value >= 1
