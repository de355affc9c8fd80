"""Configuration files, and the layers that a file is made of.

A file may name other files under `base:`. They apply before it, in order, each once, and may have bases of their own.
So a recipe holds only its differences from another.
"""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, nearest, told
from sftmix.common.files import read_text
from sftmix.common.plain import as_list

RECIPE = "recipe:"
BASE = "base"
OF_COMPARE = "variants"
"""The option that every table has and no single run."""
TABLE = "compare.yaml"
"""The file that the directory of a table has and no run."""
_MOST = 100_000
"""Most values of a file, where an alias counts as what it names."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The options of one file, without its `base`; `name` is the file's name in messages."""

    name: str
    values: dict[str, Any]


def recipes() -> list[str]:
    """List the names of the shipped recipes: their paths under sftmix/recipes without the suffix."""
    root = _recipe_directory()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def config_file(name: str, *, where: str = "--config") -> str:
    """Return the path of a configuration file; `recipe:NAME` is a file of sftmix/recipes. ConfigError if absent."""
    shipped, recipe = recipes(), name.removeprefix(RECIPE)
    if recipe != name and recipe in shipped:
        return str(_recipe_directory() / f"{recipe}.yaml")
    if recipe == name and os.path.isfile(name):
        return name
    problem = f"{where}: no {'file' if recipe == name else 'recipe'} {recipe!r}"
    raise ConfigError(told(problem, nearest(recipe, shipped), f"shipped recipes ({RECIPE}NAME): {', '.join(shipped)}"))


def refuse_table(layers: list[Layer]) -> None:
    """Raise ConfigError if the layers describe a table of variants, which is not one run."""
    file = layers[-1].name
    for layer in layers:
        if OF_COMPARE in layer.values:
            raise ConfigError(
                f"{file} describes a table of runs (by the `{OF_COMPARE}` in {layer.name}), not one run; "
                f"run it with `compare --config {file} --out DIR`"
            )


def read_layers(path: str | os.PathLike[str], applied: set[Path] | None = None) -> list[Layer]:
    """Read the layers of a file, in the order in which they apply; ConfigError for an unreadable file.

    A base that several files share is applied once, where the first of them names it: it undoes none of the others.

    applied  the files that apply before; those of this file are added
    """
    path, applied = Path(path), set() if applied is None else applied
    applied.add(path.resolve())
    values = read_yaml(path)
    if not values:
        raise ConfigError(f"{path} is empty: expected `option: value` lines")
    bases = as_list(values.pop(BASE, None) or [])
    layers: list[Layer] = []
    for name in bases:
        if not isinstance(name, str):
            raise ConfigError(f"{path}: {BASE} is {name!r}; allowed: a file, {RECIPE}NAME, or a list of them")
        base = Path(config_file(name if name.startswith(RECIPE) else str(path.parent / name), where=f"{path}: {BASE}"))
        if base.resolve() not in applied:
            layers += read_layers(base, applied)
    place, root = path.resolve(), _recipe_directory().resolve()
    recipe = place.relative_to(root).with_suffix("").as_posix() if place.is_relative_to(root) else ""
    return [*layers, Layer(f"{RECIPE}{recipe}" if recipe else str(path), values)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a YAML file of a user or of a run directory holds, which may be from anyone.

    Raises ConfigError for a file that cannot be read, repeats a key, is too deep, or unfolds to too many values.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(read_text(path))  # in Python, as the one in C crashes where lists are too deep
        node = loader.get_single_node()
        _check_nodes(node)
        values = {} if node is None else loader.construct_document(node)
    except (OSError, ValueError, ArithmeticError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a configuration: expected `option: value` lines")
    return values


def _check_nodes(node: Any) -> None:
    """Raise ValueError for a key that stands twice in one mapping: YAML would take the last one, without a word.

    Also for aliases that unfold to more than _MOST values, or to themselves.
    """
    import yaml

    nodes, seen = [node], 0
    while nodes:
        node, seen = nodes.pop(), seen + 1
        if seen + len(nodes) > _MOST:
            raise ValueError(f"with its aliases it has over {_MOST:,} values")
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        nodes += node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in pairs]
        lines: dict[str, int] = {}
        for key, _ in pairs:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and key.tag != "tag:yaml.org,2002:merge":  # all that are merged count
                raise ValueError(f"{name} stands in lines {lines[name]} and {line}; write it once")
            lines[name] = line


def _recipe_directory() -> Path:
    return Path(str(importlib.resources.files("sftmix") / "recipes"))
