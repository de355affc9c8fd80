"""Configuration files and plain values -> RunConfig."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftmix.config.layers import Layer, read_layers, refuse_table
from sftmix.config.merge import Tree, build, merge
from sftmix.config.own_modules import own_modules
from sftmix.config.run_config import RunConfig


def read_config(path: str | os.PathLike[str]) -> RunConfig:
    """Read a config.yaml or a recipe with its bases; raise ConfigError for unknown keys and classes.

    Classes that it names are not imported from its own directory, as the directory may be the run of someone else.
    """
    layers = read_layers(path)
    refuse_table(layers)
    with own_modules(outside=Path(path).expanduser().parent):
        tree: Tree = {}
        for layer in layers:
            tree = merge(tree, layer)
        return build(tree)


def from_plain(values: Mapping[str, Any]) -> RunConfig:
    """Build a configuration from (a part of) its plain form; raise ConfigError for wrong keys and values."""
    return build(merge({}, Layer("", values)))
