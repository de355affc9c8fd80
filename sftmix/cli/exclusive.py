"""Options of a command that do something else than the rest of it, and leave no room for others."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

from sftmix.common.errors import ConfigError


def refuse_others(
    option: str,
    given: argparse.Namespace,
    add_options: Callable[[argparse.ArgumentParser], None],
    *,
    kept: Collection[str],
    reason: str,
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
