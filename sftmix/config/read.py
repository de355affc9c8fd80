"""Configuration files, recipes and plain values -> RunConfig.

A file may name other files under `base:`. They apply before it, in order, each once, and may have bases of their own.
So a recipe holds only its differences from another.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftmix.config.load import load
from sftmix.config.merge import Tree, build, merge
from sftmix.config.run_config import RunConfig
from sftmix.disk.places import PathLike, place_of
from sftmix.disk.texts import read_text
from sftmix.words.errors import ConfigError, nearest, with_suggestion
from sftmix.words.given import as_list

RECIPE = "recipe:"
BASE = "base"
OF_COMPARE = "variants"
"""The option that every table has and no single run."""
_RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def recipes() -> list[str]:
    """List the names of the shipped recipes: their paths under sftmix/recipes without the suffix."""
    return sorted(path.relative_to(_RECIPES).with_suffix("").as_posix() for path in _RECIPES.rglob("*.yaml"))


def config_file(name: str, *, where: str = "--config") -> str:
    """Return the path of a configuration file; `recipe:NAME` is a file of sftmix/recipes. ConfigError if absent."""
    shipped, recipe = recipes(), name.removeprefix(RECIPE)
    if recipe != name and recipe in shipped:
        return str(_RECIPES / f"{recipe}.yaml")
    if recipe == name and os.path.isfile(name):  # without `recipe:`, a path
        return name
    problem = f"{where}: no {'file' if recipe == name else 'recipe'} {recipe!r}"
    raise ConfigError(
        with_suggestion(problem, nearest(recipe, shipped), f"shipped recipes ({RECIPE}NAME): {', '.join(shipped)}")
    )


def read_layers(path: PathLike, applied: set[Path] | None = None, *, one_run: bool = False) -> list[tuple[str, Tree]]:
    """Read the layers of a file, (name for messages, options), in the order in which they apply.

    A base that several files share is applied once, where the first of them names it: it undoes none of the others.

    applied  the files that apply before; this file and its bases are added
    one_run  refuse a table of variants, which is not one run
    """
    path, applied = Path(path), set() if applied is None else applied
    place, name = path.resolve(), str(path)
    if place.is_relative_to(_RECIPES):
        name = RECIPE + place.relative_to(_RECIPES).with_suffix("").as_posix()
    applied.add(place)
    values = read_yaml(path)
    if one_run and OF_COMPARE in values:
        raise ConfigError(
            f"{name} describes a table of runs (by its `{OF_COMPARE}`), not one run; run it with "
            f"`compare --config {name} --out DIR`"
        )
    bases = as_list(values.pop(BASE, None) or [])
    layers = []
    for base in bases:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: {BASE} is {base!r}; allowed: a file, {RECIPE}NAME, or a list of them")
        # ../base.yaml begins at the file that names it, wherever the command is called
        named = base if base.startswith(RECIPE) else str(place_of(path.parent / base))
        file = config_file(named, where=f"{path}: {BASE}")
        if Path(file).resolve() not in applied:  # by which two files that name each other end as well
            layers += read_layers(file, applied, one_run=one_run)
    return [*layers, (name, values)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a YAML file of a user or of a run directory holds, which may be from anyone.

    Keys that begin with `x-` are left out: they hold what anchors of the file name. Raises ConfigError for a file that
    cannot be read, or as `load` says.
    """
    try:
        values = load(read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a configuration: expected `option: value` lines")
    # x-rates: &rates {learning_rate: 1e-3}
    return {name: value for name, value in values.items() if not name.startswith("x-")}


# --------------------------------------------------------------------------------------------- RunConfig


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Build a configuration from (a part of) its plain form; raise ConfigError for wrong keys and values."""
    return build(merge({}, values))
