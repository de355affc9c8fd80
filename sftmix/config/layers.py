"""Configuration files, and the layers that a file is made of.

A file may name other files under `base:`. They apply before it, in order, and may have bases of their own. So a recipe
holds only its differences from another.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, nearest, told
from sftmix.config.schema import single_as_list

RECIPE = "recipe:"
BASE = "base"
OF_COMPARE = "variants"
"""The option that every table has and no single run."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The options of one file, without its `base`; `name` is the file's name in messages."""

    name: str
    values: Mapping[str, Any]


def recipes() -> list[str]:
    """List the names of the shipped recipes: their paths under sftmix/recipes without the suffix."""
    root = _recipe_directory()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def config_file(name: str, *, where: str = "--config") -> str:
    """Return the path of a configuration file; `recipe:NAME` is a file of sftmix/recipes. ConfigError if absent."""
    there = recipes()
    if not name.startswith(RECIPE):
        if not os.path.isfile(name):
            raise ConfigError(
                f"{where}: no file {name!r}; shipped recipes ({RECIPE}NAME): {', '.join(there) or 'none'}"
            )
        return name
    recipe = name.removeprefix(RECIPE)
    if recipe not in there:
        listed = ", ".join(there) or "none"
        raise ConfigError(told(f"{where}: no recipe {recipe!r}", nearest(recipe, there), f"there are {listed}"))
    return str(_recipe_directory() / f"{recipe}.yaml")


def read_layers(path: str | os.PathLike[str]) -> list[Layer]:
    """Read the layers of a file, in the order in which they apply; ConfigError for an unreadable file or a cycle."""
    return _layers(Path(path), ())


def refuse_table(layers: list[Layer]) -> None:
    """Raise ConfigError if the layers describe a table of variants, which is not one run."""
    given = layers[-1].name
    for layer in layers:
        if OF_COMPARE in layer.values:
            whose = "" if layer.name == given else f" of {layer.name}"
            raise ConfigError(
                f"{given} describes a table of runs (it has the `{OF_COMPARE}`{whose}), not one run; "
                f"run it with `compare --config {given} --out DIR`"
            )


def _layers(path: Path, above: tuple[Path, ...]) -> list[Layer]:
    place = path.resolve()
    if place in above:
        names = " -> ".join(_shown(p) for p in (*above[above.index(place) :], place))
        raise ConfigError(f"{BASE}: these configurations are made from each other: {names}")
    values = _read(path)
    found: list[Layer] = []
    for name in _bases(values.pop(BASE, None), path):
        file = name if name.startswith(RECIPE) else str(path.parent / name)
        found += _layers(Path(config_file(file, where=f"{path}: {BASE}")), (*above, place))
    return [*found, Layer(_shown(path), single_as_list(values))]


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a configuration: expected `option: value` lines")
    return values


def _bases(given: Any, path: Path) -> list[str]:
    names = [given] if isinstance(given, str) else given
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: {BASE} is {given!r}; allowed: a file, {RECIPE}NAME, or a list of them")
    return names


def _shown(path: Path) -> str:
    root = _recipe_directory().resolve()
    place = path.resolve()
    if place.is_relative_to(root):
        return RECIPE + place.relative_to(root).with_suffix("").as_posix()
    return str(path)


def _recipe_directory() -> Path:
    return Path(str(importlib.resources.files("sftmix") / "recipes"))
