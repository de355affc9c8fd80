"""RunConfig <-> jsonargparse: one parser, used by the command line and by whoever reads a config.yaml."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import jsonargparse

from sftmix.common.errors import ConfigError
from sftmix.components.base import Component
from sftmix.components.listing import catalogue
from sftmix.config import RunConfig
from sftmix.config.layers import Layer


@cache
def load_shipped() -> None:
    """Import the shipped components: a class can be chosen by its short name once it is imported."""
    catalogue()


def _classes_in(hint: object) -> Iterator[type]:
    """The classes a type hint is made of: `PairSampler | None` -> PairSampler, NoneType."""
    if inspect.isclass(hint) and not typing.get_args(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from _classes_in(argument)


def component_classes(hint: object) -> list[type[Component]]:
    """The component classes among those that a type hint is made of."""
    return [found for found in _classes_in(hint) if issubclass(found, Component)]


@cache
def component_bases() -> dict[str, type[Component]]:
    """The fields of RunConfig that hold components, with the base class of each."""
    hints = typing.get_type_hints(RunConfig)
    found = {name: component_classes(hint) for name, hint in hints.items()}
    return {name: bases[0] for name, bases in found.items() if bases}


@cache
def nested_bases() -> dict[str, type[Component]]:
    """An option of a shipped component that takes a component (`objective.mu`) -> its base class; one for each base."""
    found: dict[type[Component], str] = {}
    for field, base in component_bases().items():
        for shipped in dict(catalogue())[base.__name__]:
            for name, option in component_options(import_class(shipped.path)).items():
                for nested in component_classes(option.annotation):
                    found.setdefault(nested, f"{field}.{name}")
    return {place: base for base, place in found.items()}


@cache
def option_groups() -> dict[str, type]:
    """The fields of RunConfig that are groups of options (`data.train`), with the dataclass of each."""
    hints = typing.get_type_hints(RunConfig).items()
    return {name: hint for name, hint in hints if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


@cache
def option_hints() -> dict[str, Any]:
    """Full key -> type of every option that does not depend on the components chosen, in the order of the tree."""
    return dict(_hints_of(RunConfig, ""))


def is_group(key: str) -> bool:
    """Whether options lie under the key: `data`, `model.lora`."""
    return any(option.startswith(f"{key}.") for option in option_hints())


def _hints_of(group: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """The options of a group and of the groups inside it (`model.lora.r`)."""
    for name, hint in typing.get_type_hints(group).items():
        if dataclasses.is_dataclass(hint):
            yield from _hints_of(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def _groups_in(group: type, prefix: str) -> Iterator[str]:
    """The groups of options inside a group, outer ones first: model, model.lora, ..."""
    for name, hint in typing.get_type_hints(group).items():
        if dataclasses.is_dataclass(hint):
            yield f"{prefix}{name}"
            yield from _groups_in(typing.cast(type, hint), f"{prefix}{name}.")


def list_options() -> set[str]:
    """The options that take several values: `--data.train a --data.train+ b`."""
    return {k for k, hint in option_hints().items() if list in (typing.get_origin(h) for h in _alternatives(hint))}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """`list[str] | None` -> list[str], NoneType; anything else is its own only alternative."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def is_flag(key: str) -> bool:
    """Whether the option is true or false, so that giving its name alone means true."""
    field, _, name = key.partition(".")
    if key in option_hints():
        return option_hints()[key] is bool
    if field not in component_bases():
        return False
    classes = known_components(component_bases()[field]).values()
    return any(name in options and options[name].annotation is bool for options in map(component_options, classes))


def component_options(cls: Any) -> dict[str, inspect.Parameter]:
    """The options of a component class: its constructor's parameters, with their types resolved."""
    if cls.__init__ is object.__init__:
        return {}
    hints = typing.get_type_hints(cls.__init__)
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p.replace(annotation=hints.get(p.name, Any)) for p in parameters if p.kind in kinds}


def import_class(path: str) -> type:
    """The class at an import path that jsonargparse has resolved before."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def known_components(base: type[Component]) -> dict[str, type[Component]]:
    """Short name -> class, for every imported concrete subclass of a base class (shipped ones first)."""
    load_shipped()
    found: dict[str, type[Component]] = {}
    pending = list(base.__subclasses__())
    while pending:
        cls = pending.pop(0)
        pending += cls.__subclasses__()
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.setdefault(cls.__name__, cls)
    return found


def make_parser(prog: str | None = None) -> jsonargparse.ArgumentParser:
    """A parser that raises, and that knows null from "not given": `pairing: null` is not `auto`."""
    jsonargparse.set_parsing_settings(unset_sentinel=True)
    return jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)


def add_run_options(parser: jsonargparse.ArgumentParser) -> None:
    """Add every option of RunConfig to the parser, under its path in the tree (`--training.epochs`)."""
    load_shipped()
    parser.add_class_arguments(RunConfig, as_group=False)
    # jsonargparse takes a component's default as a class_path; given as an instance, `--objective.mu 0` is refused.
    default = RunConfig().plain()
    parser.set_defaults({name: default[name] for name in component_bases()})


def instantiate(parser: jsonargparse.ArgumentParser, parsed: jsonargparse.Namespace) -> RunConfig:
    """Build the components of a parsed namespace. A ValueError of a component's constructor is a ConfigError."""
    for name in _groups_in(RunConfig, ""):
        if not isinstance(value := parsed[name], jsonargparse.Namespace):
            last = name.rpartition(".")[2]
            raise ConfigError(f"{name}: {value!r} is not a group of options; write `{last}: {{option: value}}`")
    try:
        names = [f.name for f in dataclasses.fields(RunConfig)]  # a command's own options are left as they are
        built = parser.instantiate(jsonargparse.Namespace(**{name: parsed[name] for name in names}))
        return RunConfig(**{name: built[name] for name in names})
    except ValueError as error:
        # Where a type allows several forms, jsonargparse lists why each was refused; ours says more than "Expected".
        reasons = re.findall(r"^ +- (?!Expected an? )(.+)", str(error), re.M)
        raise ConfigError(f"a component refused its options: {'; '.join(reasons) or error}") from error


@cache
def _run_parser() -> jsonargparse.ArgumentParser:
    """One for all files: making it takes as long as reading with it, and a table reads one configuration a run."""
    parser = make_parser()
    add_run_options(parser)
    return parser


def from_plain(values: Mapping[str, Any]) -> RunConfig:
    """Build a RunConfig from plain values, with defaults for what is not given."""
    return from_layers([Layer("", values)])


def from_layers(layers: Sequence[Layer]) -> RunConfig:
    """Build a RunConfig from the layers of a file, each applied over those before it."""
    from sftmix.config.messages import explain

    parser = _run_parser()
    parsed, current = parser.get_defaults(), ""
    try:
        for layer in layers:
            current = f"{layer.name}: " if len(layers) > 1 else ""
            parsed = parser.parse_object(dict(layer.values), namespace=parsed)
    except jsonargparse.ArgumentError as error:
        raise ConfigError(current + explain(str(error))) from error
    return instantiate(parser, parsed)
