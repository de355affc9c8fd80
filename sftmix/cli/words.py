"""The words of a command that has options of its own and no configuration: `chat`, `export`, `status`, ..."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NoReturn

from sftmix.common.errors import ConfigError
from sftmix.common.names import path_problem

AddOptions = Callable[[argparse.ArgumentParser], None]
_READ = ("run", "runs", "place", "beside", "models", "prompts", "read_blind", "key", "data_dir", "shots", "test")
"""Options that name what is read: files, directories, or ids of the hub; several with commas between them."""


class WordsParser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def read_words(name: str, about: str, add_options: AddOptions, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command; raise ConfigError for names that cannot be read, and places not to be written."""
    form = argparse.RawDescriptionHelpFormatter
    parser = WordsParser(prog=f"sftmix {name}", description=about, formatter_class=form, allow_abbrev=False)
    add_options(parser)
    given = parser.parse_args(argv)
    for option in _READ:
        names = getattr(given, option, None) or ()
        for path in names.split(",") if isinstance(names, str) else names:
            try:
                os.stat(path.strip())
            except (FileNotFoundError, NotADirectoryError):
                continue  # a hub may know it
            except (OSError, ValueError) as error:  # a NUL in it is a ValueError
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(f"{path!r} cannot be read: {reason}") from None
    for option in ("to", "out"):
        place = getattr(given, option, None)
        if place and (problem := path_problem(place) or _unwritable(Path(place))):
            raise ConfigError(f"--{option}: {place!r} {problem}")
    return given


def _unwritable(place: Path) -> str | None:
    """Return why nothing can be written at a place, or None."""
    nearest = next((path for path in (place, *place.parents) if os.path.exists(path)), Path())
    if nearest != place and not nearest.is_dir():
        return f"cannot be written: {nearest} is a file; name a place in a directory"
    return None if os.access(nearest, os.W_OK) else f"cannot be written: {nearest} is not yours to write"


def refuse_others(
    option: str, given: argparse.Namespace, add_options: AddOptions, *, kept: Collection[str], reason: str
) -> None:
    """Raise ConfigError for an option that `option` would ignore: one that is neither kept nor at its default.

    add_options  gives a parser the options of the command
    """
    parser = argparse.ArgumentParser()
    add_options(parser)
    for name, value in vars(given).items():
        if name not in kept and value != parser.get_default(name):
            other = "RUN_OR_MODEL" if name == "place" else f"--{name}"
            raise ConfigError(f"{option} and {other} ({value}) exclude each other: {reason}")
