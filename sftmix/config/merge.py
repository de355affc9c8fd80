"""How options and components are chosen: layers of plain values -> one plain tree -> RunConfig.

A file, a recipe, a command line and a variant of a table are layers: mappings in which an option stands by its full key
(`objective.mu: 0.4`) or in braces (`objective: {mu: 0.4}`), in any order. `merge` lays them over each other, and checks
each value against the type of its option. `build` makes the typed tree of what results.

In the plain tree a component is {"class_path": import path, "init_args": the options that were given}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.components.base import Component, plain
from sftmix.config.classes import find_component
from sftmix.config.layers import Layer
from sftmix.config.messages import listed, no_option_of, not_allowed, unknown_option, words_beside_classes
from sftmix.config.own_modules import own_modules
from sftmix.config.run_config import RunConfig
from sftmix.config.schema import (
    alternatives,
    component_in,
    component_options,
    group_in,
    import_class,
    is_list,
    type_hints,
)
from sftmix.config.values import NoValueError, converted, from_yaml
from sftmix.options import as_list

CLASS, ARGS = "class_path", "init_args"
NO_OWN: Mapping[str, Any] = MappingProxyType({})

Tree = dict[str, Any]
"""The options that were given, nested, as plain values of their types."""


def merge(tree: Tree, layer: Layer, own: Mapping[str, Any] = NO_OWN) -> Tree:
    """Return the tree with one more layer over it; raise ConfigError, with the layer's name, for what does not fit.

    own  types of the options that a command has beside those of a run
    """
    try:
        with own_modules():
            return _group(tree, [layer.values], {**type_hints(RunConfig), **own}, "")
    except ConfigError as error:
        raise ConfigError(f"{layer.name}: {error}" if layer.name else str(error)) from error


def build(tree: Tree) -> RunConfig:
    """Make the configuration that a tree describes; what it does not name has its default."""
    hints = type_hints(RunConfig)
    with own_modules():
        return RunConfig(**{name: _built(value, hints[name], name) for name, value in tree.items() if name in hints})


# ------------------------------------------------------------------------------------------------ merging


def _group(old: Any, given: Sequence[Mapping[str, Any]], hints: Mapping[str, Any], prefix: str) -> Tree:
    """Return the options of a group; `given` are all the mappings that a layer has for it."""
    tree: Tree = dict(old or {})
    options = _by_name(given)
    for name in dict.fromkeys(name.removesuffix("+") for name in options):
        key, values, added = f"{prefix}{name}", options.get(name, []), options.get(f"{name}+", [])
        if name not in hints:
            inner = [f".{first}" for value in values if isinstance(value, Mapping) for first in value]
            raise ConfigError(unknown_option("".join([key, *inner[:1]])))
        if added and not is_list(hints[name]):
            raise ConfigError(f"{key}+: {key} takes one value, and only lists, such as data.train, can be added to")
        tree[name] = _option(tree.get(name), values, added, hints[name], key)
    return tree


def _by_name(given: Sequence[Mapping[str, Any]], more: Mapping[str, list[Any]] = NO_OWN) -> dict[str, list[Any]]:
    """Return the first part of each key with all values for it: {"objective.mu": 1} -> {"objective": [{"mu": 1}]}."""
    options = {name: list(values) for name, values in more.items()}
    for mapping in given:
        for key, value in mapping.items():
            name, _, rest = str(key).partition(".")
            options.setdefault(name, []).append({rest: value} if rest else value)
    return options


def _option(old: Any, given: Sequence[Any], added: Sequence[Any], hint: Any, key: str) -> Any:
    """Return the plain value of one option: what a layer gives, and adds to a list, over the value that it had."""
    if base := component_in(hint):
        return _several(old, given, added, base, key) if is_list(hint) else _component(old, given, hint, base, key)
    if (group := group_in(hint)) and all(isinstance(value, Mapping) for value in given):
        return _group(old, given, type_hints(group), f"{key}.")
    if group is hint:  # and nothing may stand in its place
        names = ", ".join(f"{key}.{name}" for name in type_hints(group))
        raise ConfigError(f"{key}: {given[0]!r} is not a group of options; there are {names}")
    value = _one([_value(value, hint, key) for value in given], key) if given else _default(key) if old is None else old
    items = [item for more in added for item in as_list(_value(more, hint, key))]
    return [*as_list([] if value is None else value), *items] if added else value


def _value(value: Any, hint: Any, key: str) -> Any:
    try:
        return converted(value, hint)
    except NoValueError as error:
        raise ConfigError(not_allowed(key, hint, error.value)) from error


def _one(values: Sequence[Any], key: str) -> Any:
    """Return the one value of an option; a layer may give it twice if it says the same."""
    for other in values[1:]:
        if other != values[0]:
            raise ConfigError(f"{key} has two values, {values[0]!r} and {other!r}; write it once")
    return values[0]


def _default(key: str) -> Any:
    """Return the default of an option of the tree, in plain form."""
    value: Any = RunConfig()
    for name in key.split("."):
        value = getattr(value, name, None)
    return plain(value)


def _several(old: Any, given: Sequence[Any], added: Sequence[Any], base: type[Component], key: str) -> list[Any]:
    """Return the components of a list. Options without a class (`callbacks.every`) are those of the last one."""
    options = [value for value in given if isinstance(value, Mapping) and not _names_class(value)]
    lists = [from_yaml(value) for value in given if value not in options]
    if None in lists:
        raise ConfigError(f"{key} is null; it takes a list, [] for none, of {listed(base)}")
    there = [] if lists else _default(key) if old is None else old
    lists = [_one(lists, key)] if lists else []
    named = [[one] for components in [*lists, *map(from_yaml, added)] for one in as_list(components)]
    if options and named:
        named[-1] += options
    elif options and there:
        there = [*there[:-1], _component(there[-1], options, base, base, key)]
    elif options:
        raise ConfigError(f"{key} is an empty list, so {key}.{next(iter(options[0]))} has no owner; name a class")
    return [*there, *(_component(None, one, base, base, key) for one in named)]


def _names_class(spec: Mapping[str, Any]) -> bool:
    return CLASS in spec or any(str(name)[:1].isupper() for name in spec)


def _component(old: Any, given: Sequence[Any], hint: Any, base: type[Component], key: str) -> Any:
    """Return a component as its class and its options, or another value that the option takes in its place.

    Options without a class are those of the class in force. Options of the class before stay if the new one has them.
    """
    values = [from_yaml(value) if isinstance(value, str) and value.startswith("{") else value for value in given]
    options = _by_name([value for value in values if isinstance(value, Mapping)])
    words = [*(value for value in values if not isinstance(value, Mapping)), *options.pop(CLASS, [])]
    for inner in options.pop(ARGS, []):
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{key}.{ARGS} is {_shown(inner)}; write {{{CLASS}: CLASS, {ARGS}: {{option: value}}}}")
        options = _by_name([inner], options)
    if words:
        word, others = _one(words, key), [kind for kind in alternatives(hint) if component_in(kind) is None]
        for kind in others:
            with suppress(NoValueError):
                value = converted(word, kind)
                if options:
                    raise ConfigError(
                        f"{key}: {_shown(word)} has no options; choose a class that has some: {listed(base)}"
                    )
                return value
        cls = _class(word, hint, base, key)
    else:
        cls = _class_in_force(old, base, key, options)
    known = component_options(cls)
    args = {name: value for name, value in (old[ARGS] if isinstance(old, Mapping) else {}).items() if name in known}
    for name, given_here in options.items():
        if name not in known:
            raise ConfigError(no_option_of(cls, name, key, list(known)))
        args[name] = _option(args.get(name), given_here, (), known[name].annotation, f"{key}.{name}")
    return {CLASS: f"{cls.__module__}.{cls.__qualname__}", ARGS: args}


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _class_in_force(old: Any, base: type[Component], key: str, options: Iterable[str]) -> type[Component]:
    """Return the class that options without one belong to: that of the layers before, or the default."""
    spec = _default(key) if old is None and "." not in key else old
    if isinstance(spec, Mapping):
        return import_class(spec[CLASS])
    if classes := [name for name in options if name[:1].isupper()]:
        raise ConfigError(
            f"{key}: write {{{CLASS}: {classes[0]}, {ARGS}: {{option: value}}}}, not {classes[0]} as a key"
        )
    raise ConfigError(f"{key} is no {base.__name__} that has options; choose one first, --{key} CLASS: {listed(base)}")


def _class(word: Any, hint: Any, base: type[Component], key: str) -> type[Component]:
    """Return the class that a word chooses; raise ConfigError, which lists what else the option takes."""
    numbers_too = bool({int, float, str, bool} & set(alternatives(hint)))
    if not numbers_too and word is None:
        raise ConfigError(f"{key} is null; it takes one of {listed(base)}")
    try:
        return find_component(base, str(word), words_beside_classes(hint))
    except ConfigError as error:
        if not isinstance(word, str) or (numbers_too and "." not in word):
            raise ConfigError(not_allowed(key, hint, word)) from error
        raise ConfigError(f"{key}: {error}") from error


# ------------------------------------------------------------------------------------------------ building


def _built(value: Any, hint: Any, key: str) -> Any:
    """Make the components and the groups of a plain value."""
    if component_in(hint) and isinstance(value, list):
        return [_built(one, hint, key) for one in value]
    if component_in(hint) and isinstance(value, Mapping):
        return _made(import_class(value[CLASS]), value[ARGS], key)
    if (group := group_in(hint)) and isinstance(value, Mapping):
        hints = type_hints(group)
        return group(**{name: _built(inner, hints[name], f"{key}.{name}") for name, inner in value.items()})
    return value


def _made(cls: type[Component], args: Mapping[str, Any], key: str) -> Component:
    known = component_options(cls)
    if missing := [f"{key}.{p.name}" for p in known.values() if p.default is p.empty and p.name not in args]:
        raise ConfigError(f"{key}: {cls.__name__} needs {', '.join(missing)}")
    made = {name: _built(value, known[name].annotation, f"{key}.{name}") for name, value in args.items()}
    try:
        return cls(**made)
    except ValueError as error:
        raise ConfigError(f"{key}: {cls.__name__} refused its options: {error}") from error
