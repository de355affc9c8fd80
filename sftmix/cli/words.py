"""The words of a command that has options of its own and no configuration: `chat`, `export`, `status`, ..."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sftmix.common.errors import ConfigError
from sftmix.common.names import path_problem


class WordsParser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(
            prog=f"sftmix {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def read_words(name: str, command: Any, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command; raise ConfigError for places that cannot be written.

    command  its module, with the description ABOUT, and `add_options`, which gives a parser its options
    """
    parser = WordsParser(name, command.ABOUT)
    command.add_options(parser)
    args = parser.parse_args(argv)
    for option in ("to", "out"):
        place = getattr(args, option, None)
        if place and (problem := path_problem(place) or _unwritable(Path(place))):
            raise ConfigError(f"--{option}: {place!r} {problem}")
    return args


def _unwritable(place: Path) -> str | None:
    """Return why nothing can be written at a place, or None."""
    existing = next((path for path in (place, *place.parents) if os.path.exists(path)), Path())
    if (existing == place or existing.is_dir()) and os.access(existing, os.W_OK):
        return None
    return f"cannot be written: {existing} is a file, or not yours to write; name a place in a directory of yours"
