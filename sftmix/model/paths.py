"""Names of models: a directory or a hub id; apart from loading, as a wrong name is refused before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sftmix.common.errors import ConfigError


def model_place(path: str | Path) -> tuple[str, bool]:
    """Return the directory of a model and True, or its hub id and False.

    Raises ConfigError for a path that is no directory. `NAME` and `OWNER/NAME` are hub ids where there is no such path.
    """
    name = str(path)
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()
    name = os.path.expanduser(name) if local else name
    if not name or (local and not Path(name).is_dir()):
        raise ConfigError(f"model.path: {path} is not a directory. Give a hub id or a directory with a model.")
    return name, local


def refuse_adapters(path: str | Path) -> None:
    """Raise ConfigError for a directory that holds adapters and no model."""
    if (Path(path).expanduser() / "adapter_config.json").exists():
        raise ConfigError(
            f"model.path: {path} holds adapters, not a model: sftmix export RUN --to DIR --merge makes one."
        )


@contextmanager
def named(option: str) -> Iterator[None]:
    """Let errors about a model name the option that chose it, in place of model.path."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        if option == "model.path" or not text.startswith("model.path:"):
            raise
        raise ConfigError(f"{option}{text.removeprefix('model.path')}") from error
