"""Values of options as they were given: a path becomes text when it is set, a single name a list of one."""

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sftmix.words.errors import ConfigError, nearest, with_suggestion
from sftmix.words.shown import quoted


@dataclass
class OptionFields:
    """A group of options: whenever one is set, a path becomes text."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in (known := self.__dataclass_fields__):
            problem = f"{type(self).__name__} has no option {name!r}, which was set to {value!r}"
            raise ConfigError(with_suggestion(problem, nearest(name, known), f"it has {', '.join(known)}"))
        super().__setattr__(name, path_text(value))


def path_text(value: Any) -> Any:
    """Return a path as text, also in a list, relative as it is given; all else as it is."""
    if isinstance(value, list) and any(isinstance(item, os.PathLike) for item in value):
        return [path_text(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def not_utf8(name: str) -> str:
    """Return why files of a run cannot hold a name, or "" if they can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"{quoted(name)}, which is not UTF-8: give it another name, or set PYTHONUTF8=1 if it is"
    return ""


def as_written(number: float) -> Fraction:
    """Return the number that a user wrote: 1.1 is 11/10, so that 0.07 of 100 steps are 7, and not 8 when rounded up."""
    return Fraction(number).limit_denominator(1_000_000)


def as_list(value: Any) -> list[Any]:
    """Return a list of names or numbers, a list itself; a single one becomes a list of one."""
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, list) else [value]


def spelling(value: object) -> str:
    """Return the one text of a scalar, by which values of rows are compared with values of options.

    True, "TRUE" and "true" are `true`; 1, 1.0, "1.0" and "1" are `1`. Any other text is itself.
    """
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else re.sub(r"^(-?\d+)\.0+$", r"\1", text)
