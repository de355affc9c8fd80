"""Configuration files and plain values -> RunConfig."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.common.plain import as_list
from sftmix.components.base import Component
from sftmix.config.classes import own_modules
from sftmix.config.layers import Layer, read_layers, refuse_table
from sftmix.config.merge import CLASS, Tree, build, merge
from sftmix.config.run_config import RunConfig
from sftmix.config.schema import component_bases


def read_config(path: str | os.PathLike[str]) -> RunConfig:
    """Read a config.yaml or a recipe with its bases; raise ConfigError for unknown keys and classes.

    Classes that it names are not imported from its own directory, as the directory may be the run of someone else.
    """
    layers = read_layers(path)
    refuse_table(layers)
    with own_modules(outside=Path(path).expanduser().parent):
        return _from_layers(layers)


def read_finished(run: Path) -> RunConfig:
    """Read the config.yaml of a run for what only reads the run; raise ConfigError as above.

    Components that are not of sftmix are not imported, as the author of the run may be anyone: others of their names
    and plain forms, which do nothing, stand in their places.
    """
    layers, foreign = read_layers(run / "config.yaml"), dict[str, Any]()
    refuse_table(layers)
    for layer in layers:
        for name in component_bases().keys() & layer.values.keys():
            if re.search(_FOREIGN, json.dumps(layer.values[name], default=str)):
                foreign[name] = layer.values.pop(name)
    with own_modules(outside=Path("/")):
        config = _from_layers(layers)
    for name, values in foreign.items():
        stand_ins = [_stand_in(component_bases()[name], one) for one in as_list(values)]
        setattr(config, name, stand_ins if isinstance(values, list) else stand_ins[0])
    return config


_FOREIGN = r'"class_path": "(?!sftmix\.)[^"]*\.'
"""In the plain form of components as JSON: one that is not of sftmix; short names have no dot."""


def _stand_in(base: type[Component], plain_form: Mapping[str, Any]) -> Component:
    """Return a component of this plain form that does nothing. Subclasses of `base` would be found by their names."""
    module, _, name = str(plain_form.get(CLASS)).rpartition(".")
    methods = {"spec": lambda _: dict(plain_form), "__getattr__": lambda _, key: getattr(base, key)}
    return object.__new__(type(name, (Component,), {"__module__": module, **methods}))


def from_plain(values: Mapping[str, Any]) -> RunConfig:
    """Build a configuration from (a part of) its plain form; raise ConfigError for wrong keys and values."""
    return _from_layers([Layer("", dict(values))])


def _from_layers(layers: Sequence[Layer]) -> RunConfig:
    tree: Tree = {}
    for layer in layers:
        tree = merge(tree, layer)
    return build(tree)
