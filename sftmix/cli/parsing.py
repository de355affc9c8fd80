"""A command line -> RunConfig, with notes about options that replaced others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse

from sftmix.cli.arguments import Arguments, OwnOption, sort_arguments
from sftmix.cli.results import say
from sftmix.common.errors import ConfigError
from sftmix.config import RunConfig
from sftmix.config.layers import OF_COMPARE, Layer, read_layers, refuse_table
from sftmix.config.messages import explain
from sftmix.config.own_modules import own_modules
from sftmix.config.read import Parser, add_run_options, apply_layer, instantiate, of_run
from sftmix.config.schema import component_bases, component_options, import_class, list_options


def configuration(
    name: str, about: str, argv: Sequence[str], own: Sequence[OwnOption] = (), *, prints: bool = False
) -> tuple[RunConfig, jsonargparse.Namespace]:
    """Return the RunConfig of a command line and all parsed values; --help and --print_config end here.

    prints  take --print_config, which prints the configuration without the options in `own`, in spite of these
    """
    given = sort_arguments(argv, [o.name for o in own], [o.name for o in own if o.type is bool])
    if given.help is not None:
        from sftmix.cli.help import help_text

        print(help_text(name, f"sftmix {name} [--config FILE] [options]", about, given.help, own), end="")
        raise SystemExit(0)
    parser = build_parser(tuple(own))
    config, parsed, notes = parse(parser, given)
    for note in notes:
        say(f"note: {note}")
    if given.print_config is not None:
        if own and not prints:
            raise ConfigError(f"--print_config is an option of `run`, not of `{name}`")
        print_config(build_parser(), of_run(parsed), given.print_config)
    return config, parsed


@cache
def build_parser(own: tuple[OwnOption, ...] = ()) -> Parser:
    """Make the parser of a command that takes a run's configuration and options of its own; once for each `own`."""
    parser = Parser()
    parser.add_argument("--config", action="config")
    add_run_options(parser)
    for option in own:
        parser.add_argument(f"--{option.name}", type=option.type, default=option.default)
    parser.own = {option.name: option.type for option in own}
    return parser


def parse(parser: Parser, given: Arguments) -> tuple[RunConfig, jsonargparse.Namespace, list[str]]:
    """Return the configuration, all parsed values, and notes."""
    notes = list(given.notes)
    before, parsed = None, parser.get_defaults()
    for layer in _layers(parser, given.configs):
        parsed = apply_layer(parser, layer, parsed, parser.own)
        notes += _changes(before, parsed, f"--config {layer.name}")
        before = parsed
    parsed = _parse(parser, given.options, parsed)
    notes += _changes(before, parsed, "the command line")
    return instantiate(parser, parsed), parsed, notes


def parse_variant(
    parser: Parser, options: Mapping[str, Any], base: jsonargparse.Namespace
) -> tuple[RunConfig, list[str]]:
    """Return the configuration of the options over the parsed values `base`, and notes on their changes to it."""
    parsed = apply_layer(parser, Layer("", dict(options)), base)
    return instantiate(parser, parsed), list(_changes(base, parsed, "the variant"))


def print_config(parser: Parser, parsed: jsonargparse.Namespace, flags: str) -> None:
    """Print all parsed values as YAML that --config takes back, and raise SystemExit(0).

    flags  of jsonargparse's --print_config, such as skip_default
    """
    _parse(parser, [f"--print_config={flags}"], parsed)


def _layers(parser: Parser, configs: Sequence[str]) -> Iterator[Layer]:
    """Yield every layer of the files, in the order in which they apply."""
    applied = set[Path]()
    for config in configs:
        layers = read_layers(config, applied)
        if OF_COMPARE not in parser.own:
            refuse_table(layers)
        yield from layers


def _parse(parser: Parser, options: Sequence[str], over: jsonargparse.Namespace) -> jsonargparse.Namespace:
    """Apply options of the command line over parsed values."""
    try:
        with own_modules():
            return parser.parse_args(list(options), namespace=_with_plain_groups(over.clone()))
    except jsonargparse.ArgumentError as error:
        raise ConfigError(explain(str(error), parser.own)) from error


def _with_plain_groups(parsed: jsonargparse.Namespace) -> jsonargparse.Namespace:
    """Return parsed values with mappings for the groups of components (`reference.training`).

    jsonargparse takes its own form of a group, which has no class_path, for no value of the option that holds it.
    """
    for name in component_bases().keys() - list_options():
        spec = parsed[name]
        options = vars(spec.init_args) if isinstance(spec, jsonargparse.Namespace) and spec.get("init_args") else {}
        groups = {k: v for k, v in options.items() if isinstance(v, jsonargparse.Namespace) and "class_path" not in v}
        options.update({key: group.as_dict() for key, group in groups.items()})
    return parsed


def _changes(before: Any, after: Any, by: str) -> Iterator[str]:
    """Yield a note for each component that has another class in `after` and lost or kept options by it."""
    for name in component_bases() if before is not None else ():
        if name in list_options():
            there = [_class(spec) for spec in after[name]]
            gone = [_shown(spec) for spec in before[name] if _class(spec) not in there]
            if gone:
                yield f"{name}: {by} drops {', '.join(gone)}"
        elif isinstance(before[name], jsonargparse.Namespace) and _class(before[name]) is not _class(after[name]):
            yield from _replaced(name, before[name], after[name], by)


def _replaced(name: str, old: jsonargparse.Namespace, new: Any, by: str) -> Iterator[str]:
    chosen = _chosen(old)
    remaining = (new.get("init_args") or {}) if isinstance(new, jsonargparse.Namespace) else {}
    kept = [k for k, v in chosen.items() if k in remaining and remaining[k] == v]
    dropped = [f"{k}={v}" for k, v in chosen.items() if k not in kept]
    words = [f"{verb} {', '.join(options)}" for verb, options in (("dropped", dropped), ("kept", kept)) if options]
    if words:
        yield f"{name}: {by} puts {_name(new)} in place of {_name(old)}; {', '.join(words)}"


def _class(spec: Any) -> Any:
    """Return the class of a component; `auto` and null of --pairing are returned as they are."""
    return import_class(spec["class_path"]) if isinstance(spec, jsonargparse.Namespace) else spec


def _name(spec: Any) -> str:
    found = _class(spec)
    return found.__name__ if isinstance(found, type) else "null" if found is None else str(found)


def _chosen(spec: jsonargparse.Namespace) -> dict[str, Any]:
    """Return the options of a component that differ from its defaults."""
    options = component_options(_class(spec))
    args = dict((spec.get("init_args") or {}).items())
    return {k: v for k, v in args.items() if v is not None and (k not in options or v != options[k].default)}


def _shown(spec: jsonargparse.Namespace) -> str:
    return f"{_name(spec)}({', '.join(f'{k}={v}' for k, v in _chosen(spec).items())})"
