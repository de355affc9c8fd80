"""Differences of two plain forms, such as two configurations."""

from collections.abc import Iterator, Mapping
from typing import Any


class _Nothing:
    """The value of a key that is not there."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


def differing(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (option, old, new) of each value in which two plain forms differ; components of two classes are one value.

    key  the option's name, with dots; constructor arguments of a component are below its own
    A key that one side lacks has the value NOTHING there.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("class_path") == new.get("class_path"):
        for name in dict.fromkeys([*old, *new]):
            # objective: {init_args: {mu: 1}} is objective.mu
            inner = key if name == "init_args" else f"{key}.{name}" if key else str(name)
            yield from differing(old.get(name, NOTHING), new.get(name, NOTHING), inner)
    elif [old] != [new]:  # in lists, since nan is itself there
        yield key, old, new
