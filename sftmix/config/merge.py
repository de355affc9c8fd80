"""How options and components are chosen: layers of plain values -> one plain tree -> RunConfig.

A file, a recipe, a command line and a variant of a table are layers: mappings in which an option stands by its full key
(`objective.mu: 0.4`) or in braces (`objective: {mu: 0.4}`), in any order. `merge` lays them over each other, and checks
each value against the type of its option. `build` makes the typed tree of what results.

In the plain tree a component is {"class_path": import path, "init_args": the options that were given}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from inspect import Parameter
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.common.plain import as_list
from sftmix.components.base import Component
from sftmix.config.classes import find_component, import_class, listed, own_modules
from sftmix.config.layers import Layer
from sftmix.config.run_config import RunConfig
from sftmix.config.schema import alternatives, component_in, group_in, is_list, options_of
from sftmix.config.values import NoValueError, converted, from_yaml, no_option_of, not_allowed, unknown_option, words_of

CLASS, ARGS = "class_path", "init_args"

Tree = dict[str, Any]
"""The options that were given, nested, as plain values of their types."""


def merge(tree: Tree, layer: Layer, more: Mapping[str, Parameter] | None = None) -> Tree:
    """Return the tree with one more layer over it; raise ConfigError, with the layer's name, for what does not fit.

    more  the options that a command has beside those of a run
    """
    try:
        with own_modules():
            return _merge_options(tree, _by_name([layer.values]), {**options_of(RunConfig), **(more or {})}, "")
    except ConfigError as error:
        raise ConfigError(f"{layer.name}: {error}" if layer.name else str(error)) from error


def build(tree: Tree) -> RunConfig:
    """Make the configuration that a tree describes; what it does not name has its default."""
    with own_modules():
        return _make(RunConfig, {name: tree[name] for name in options_of(RunConfig) if name in tree}, "")


# ------------------------------------------------------------------------------------------------ merging


def _by_name(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the first part of each key with all values for it: {"objective.mu": 1} -> {"objective": [{"mu": 1}]}.

    What stands in init_args is taken out of it.
    """
    options: dict[str, list[Any]] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            name, _, rest = str(key).removeprefix(f"{ARGS}.").partition(".")
            inner = {name: [{rest: value} if rest else value]}
            if name == ARGS and isinstance(value, Mapping):
                inner = _by_name([value])
            for option, values in inner.items():
                options.setdefault(option, []).extend(values)
    return options


def _merge_options(
    old: Tree,
    new: Mapping[str, list[Any]],
    known: Mapping[str, Parameter],
    prefix: str,
    cls: type[Component] | None = None,
) -> Tree:
    """Return the options of a group, or of a component of this class: those that a layer gives over the old ones.

    new  all values that the layer has for an option, by its name, or by `name+` for what is added to a list
    """
    tree = dict(old)
    for name in dict.fromkeys(name.removesuffix("+") for name in new):
        key = f"{prefix}{name}"
        values, added = new.get(name, []), new.get(f"{name}+", [])
        if name not in known:
            inner = [f".{first}" for value in values if isinstance(value, Mapping) for first in value]
            raise unknown_option("".join([key, *inner[:1]])) if cls is None else no_option_of(cls, key)
        if added and not is_list(known[name].annotation):
            raise ConfigError(f"{key}+: {key} takes one value, and only lists, such as data.train, can be added to")
        old_value = tree[name] if name in tree else _plain_default(known[name].default)
        tree[name] = _merge_option(old_value, values, added, known[name].annotation, key)
    return tree


def _plain_default(value: Any) -> Any:
    """Return a default as the tree has it: of a component its class alone, whose options have defaults themselves."""
    if isinstance(value, Component):
        return {**value.spec(), ARGS: {}}
    return [_plain_default(one) for one in value] if isinstance(value, list) else value


def _merge_option(old: Any, new: Sequence[Any], added: Sequence[Any], hint: Any, key: str) -> Any:
    """Return the plain value of one option: what a layer gives, and adds to a list, over the value that it had."""
    if base := component_in(hint):
        return (
            _merge_components(old, new, added, base, key)
            if is_list(hint)
            else _merge_component(old, new, hint, base, key)
        )
    if (group := group_in(hint)) and all(isinstance(value, Mapping) for value in new):
        return _merge_options(old if isinstance(old, dict) else {}, _by_name(new), options_of(group), f"{key}.")
    value = _one([_convert(value, hint, key) for value in new], key) if new else old
    items = [item for more in added for item in as_list(_convert(more, hint, key))]
    return [*as_list([] if value in (None, Parameter.empty) else value), *items] if added else value


def _convert(value: Any, hint: Any, key: str) -> Any:
    try:
        return converted(value, hint)
    except NoValueError as error:
        raise not_allowed(key, hint, error.args[0]) from error


def _one(values: Sequence[Any], key: str) -> Any:
    """Return the one value of an option; a layer may give it twice if it says the same."""
    for other in values[1:]:
        if other != values[0]:
            raise ConfigError(f"{key} has two values, {values[0]!r} and {other!r}; write it once")
    return values[0]


def _merge_components(old: Any, new: Sequence[Any], added: Sequence[Any], base: type[Component], key: str) -> list[Any]:
    """Return the components of a list. Options without a class (`callbacks.every`) are those of the last one."""
    options = [value for value in new if isinstance(value, Mapping) and CLASS not in value]
    lists = [from_yaml(value) for value in new if value not in options]
    chosen = [*as_list(_one(lists, key))] if lists else []
    chosen += [one for more in added for one in as_list(from_yaml(more))]
    components = [] if lists else [*old]
    components += [_merge_component(None, [one], base, base, key) for one in chosen]
    if options and not components:
        raise ConfigError(f"{key} is an empty list, so {key}.{next(iter(options[0]))} has no owner; name a class")
    if options:
        components[-1] = _merge_component(components[-1], options, base, base, key)
    return components


def _merge_component(old: Any, new: Sequence[Any], hint: Any, base: type[Component], key: str) -> Any:
    """Return a component as its class and its options, or another value that the option takes in its place.

    Options without a class are those of the class in force. Options of the class before stay if the new one has them.
    """
    values = [from_yaml(value) if isinstance(value, str) and value.startswith("{") else value for value in new]
    options = _by_name([value for value in values if isinstance(value, Mapping)])
    words = [*(value for value in values if not isinstance(value, Mapping)), *options.pop(CLASS, [])]
    if words:
        word = _one(words, key)
        for kind in alternatives(hint):
            with suppress(NoValueError):
                value = converted(word, kind)
                if options:
                    shown = "null" if word is None else word
                    raise ConfigError(f"{key}: {shown} has no options; choose a class that has some: {listed(base)}")
                return value
        if not isinstance(word, str):
            raise not_allowed(key, hint, word)
        cls = find_component(base, word, key, words_of(hint))
    elif isinstance(old, Mapping):
        cls = import_class(old[CLASS])
    else:
        raise ConfigError(
            f"{key} is no {base.__name__} that has options; choose one first, --{key} CLASS: {listed(base)}"
        )
    known = options_of(cls)
    shared = {name: value for name, value in old[ARGS].items() if name in known} if isinstance(old, Mapping) else {}
    args = _merge_options(shared, options, known, f"{key}.", cls)
    return {CLASS: f"{cls.__module__}.{cls.__qualname__}", ARGS: args}


# ------------------------------------------------------------------------------------------------ building


def _make(cls: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    """Make the tree, a group or a component of its plain options; `prefix` is what stands before their names."""
    known, key = options_of(cls), prefix.removesuffix(".")
    if missing := [f"{prefix}{p.name}" for p in known.values() if p.default is p.empty and p.name not in tree]:
        raise ConfigError(f"{key}: {cls.__name__} needs {', '.join(missing)}")
    options = {name: _make_value(value, known[name].annotation, f"{prefix}{name}.") for name, value in tree.items()}
    try:
        return cls(**options)
    except ValueError as error:
        raise ConfigError(f"{key}: {cls.__name__} refused its options: {error}") from error


def _make_value(value: Any, hint: Any, prefix: str) -> Any:
    if component_in(hint) and isinstance(value, list):
        return [_make_value(one, hint, prefix) for one in value]
    if component_in(hint) and isinstance(value, Mapping):
        return _make(import_class(value[CLASS]), value[ARGS], prefix)
    if (group := group_in(hint)) and isinstance(value, Mapping):
        return _make(group, value, prefix)
    return value
