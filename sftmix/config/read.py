"""Plain values and configuration files -> RunConfig, by one parser, which the command line extends."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonargparse

from sftmix.common.errors import ConfigError
from sftmix.components.base import Component
from sftmix.config.layers import Layer, read_layers, refuse_table
from sftmix.config.messages import explain, refuse_unknown
from sftmix.config.nested import nested, with_last
from sftmix.config.own_modules import own_modules
from sftmix.config.run_config import RunConfig
from sftmix.config.schema import component_bases, list_options, load_shipped
from sftmix.options import as_list


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
    for name, given in foreign.items():
        stand_ins = [_stand_in(component_bases()[name], one) for one in as_list(given)]
        setattr(config, name, stand_ins if isinstance(given, list) else stand_ins[0])
    return config


_FOREIGN = r'"class_path": "(?!sftmix\.)[^"]*\.'
"""In the plain form of components as JSON: one that is not of sftmix; short names have no dot."""


def _stand_in(base: type[Component], given: Mapping[str, Any]) -> Component:
    """Return a component of this plain form that does nothing. Subclasses of `base` would be found by their names."""
    module, _, name = str(given.get("class_path")).rpartition(".")
    methods = {"spec": lambda _: dict(given), "__getattr__": lambda _, key: getattr(base, key)}
    return object.__new__(type(name, (Component,), {"__module__": module, **methods}))


def from_plain(values: Mapping[str, Any]) -> RunConfig:
    """Build a configuration from (a part of) its plain form; raise ConfigError for wrong keys and values."""
    return _from_layers([Layer("", dict(values))])


class Parser(jsonargparse.ArgumentParser):
    """A parser that raises its errors, and keeps null apart from "not given": `pairing: null` is not `auto`.

    own  the options of a command beside those of a run, with their types
    """

    own: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, **options: Any) -> None:
        jsonargparse.set_parsing_settings(unset_sentinel=True)
        super().__init__(**{"exit_on_error": False, "allow_abbrev": False, **options})


def add_run_options(parser: Parser) -> None:
    """Add every option of RunConfig to the parser, under its path in the tree (`--training.epochs`)."""
    load_shipped()
    parser.add_class_arguments(RunConfig, as_group=False)
    # jsonargparse takes a component's default as a class_path; given as an instance, `--objective.mu 0` is refused.
    default = RunConfig().plain()
    parser.set_defaults({name: default[name] for name in component_bases()})


def of_run(parsed: jsonargparse.Namespace) -> jsonargparse.Namespace:
    """Return the parsed options of a run, without those of a command."""
    return jsonargparse.Namespace(**{f.name: parsed[f.name] for f in dataclasses.fields(RunConfig)})


def instantiate(parser: Parser, parsed: jsonargparse.Namespace) -> RunConfig:
    """Build the components of parsed values; a ValueError of a component's constructor becomes a ConfigError."""
    try:
        built = parser.instantiate(of_run(parsed))
        return RunConfig(**{f.name: built[f.name] for f in dataclasses.fields(RunConfig)})
    except ValueError as error:
        # Where a type allows several forms, jsonargparse lists why each was refused; ours says more than "Expected".
        reasons = re.findall(r"^ +- (?!Expected an? )(.+)", str(error), re.M)
        raise ConfigError(f"a component refused its options: {'; '.join(reasons) or error}") from error


@cache
def _run_parser() -> Parser:
    """Return one parser for all files: to make it takes as long as to read a file, and a table reads many."""
    parser = Parser()
    add_run_options(parser)
    return parser


def _from_layers(layers: Sequence[Layer]) -> RunConfig:
    """Apply each layer of a file over those before it."""
    parser = _run_parser()
    parsed = parser.get_defaults()
    for layer in layers:
        parsed = apply_layer(parser, layer, parsed)
    return instantiate(parser, parsed)


def apply_layer(
    parser: Parser, layer: Layer, over: jsonargparse.Namespace, own: Mapping[str, Any] = MappingProxyType({})
) -> jsonargparse.Namespace:
    """Return the values of a layer over parsed ones; raise ConfigError for unknown keys and values.

    own  the options of a command beside those of a run, with their types
    """
    where = f"{layer.name}: " if layer.name else ""
    try:
        # A copy: jsonargparse puts its own objects into the lists that it is given.
        values = copy.deepcopy(_of_last(nested(layer.values), over))
        refuse_unknown(values, own)
        with own_modules():
            return parser.parse_object(values, namespace=over.clone())
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error
    except jsonargparse.ArgumentError as error:
        raise ConfigError(where + explain(str(error), own)) from error


def _of_last(values: Mapping[str, Any], over: jsonargparse.Namespace) -> dict[str, Any]:
    """Give options of a component in a list (`callbacks.every`) to the last one in force, if the layer names none."""
    found = dict(values)
    for name in list_options() & component_bases().keys():
        if isinstance(options := found.get(name), Mapping):
            there = [one.as_dict() for one in over[name]]
            for option in options["init_args"].keys() if there else ():
                there[-1].get("init_args", {}).pop(option, None)
            found[name] = with_last(there, options, name)
    return found
