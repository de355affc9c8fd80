"""How options and components are chosen: layers of plain values -> one plain tree -> RunConfig.

A file, a recipe, a command line and a variant of a table are layers: mappings from the full key of an option
(`objective.mu: 0.4`) or in braces (`objective: {mu: 0.4}`), in any order. `merge` lays them over each other, and checks
each value against the type of its option. `build` makes the RunConfig of the result.

In the plain tree a component is {"class_path": import path, "init_args": the options that were given}.
"""

from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.common.plain import as_list
from sftmix.components.component import Component
from sftmix.config.run_config import RunConfig
from sftmix.config.schema import (
    component_in,
    find_component,
    group_in,
    import_class,
    is_list,
    listed_components,
    options_of,
)
from sftmix.config.values import NoValueError, converted, from_yaml, no_option_of, not_allowed, unknown_option, words_of

CLASS, ARGS = "class_path", "init_args"

Tree = dict[str, Any]
"""The options that were given, nested, as plain values of their types."""


def merge(tree: Tree, values: Mapping[str, Any], more: Mapping[str, Any] | None = None, *, of: str = "") -> Tree:
    """Return the tree with one more layer of values over it; raise ConfigError for what does not fit.

    more  name -> parameter of each option that a command has besides a run's
    of    the name of the file, for messages
    """
    try:
        return _merge_options(tree, values, {**options_of(RunConfig), **(more or {})}, "")
    except ConfigError as error:
        raise type(error)(f"{of}: {error}" if of else str(error)) from error


def build(tree: Tree) -> RunConfig:
    """Make the configuration that a tree describes; options that it does not name have their defaults."""
    config = _make(tree, RunConfig, "")
    return config


# ------------------------------------------------------------------------------------------------ merging


class _Parts(dict[str, Any]):
    """Values that keys with dots gave, and nothing else: of a mapping they change these entries, and no others."""


def _by_name(*mappings: Mapping[str, Any]) -> Tree:
    """Group values by the first part of their keys.

    If a key has options and a value, the value is the name of a component, and so its class_path: {"mu.start": 0, "mu":
    "Linear"} -> {"mu": {"start": 0, "class_path": "Linear"}}.
    """
    options: Tree = {}
    for key, value in (item for mapping in mappings for item in mapping.items()):
        name, _, rest = str(key).partition(".")
        old, new = options.get(name), _Parts({rest: value}) if rest else value
        if name in options and (isinstance(old, Mapping) or isinstance(new, Mapping)):
            kind = _Parts if isinstance(old, _Parts) and isinstance(new, _Parts) else dict
            new = kind(_by_name(_with_class(old), _with_class(new)))
        elif name in options and old != new:
            raise ConfigError(f"{name} has two values, {old!r} and {new!r}; write it once")
        options[name] = new
    return options


def _with_class(value: Any) -> Mapping[str, Any]:
    """Return the options of a component; a name alone becomes its class_path."""
    return value if isinstance(value, Mapping) else {CLASS: value}


def _merge_options(
    old: Tree,
    new: Mapping[str, Any],
    known: Mapping[str, Any],
    prefix: str,
    cls: type[Component] | None = None,
) -> Tree:
    """Lay the options of a layer over the old ones of a group, or of a component of class `cls`.

    new  values by the names of options, or by `name+` for what is added to a list
    """
    tree, layer = dict(old), _by_name(new)
    for name in dict.fromkeys(name.removesuffix("+") for name in layer):
        key = f"{prefix}{name}"
        if name not in known:
            inner = [f".{first}" for first in layer[name]] if isinstance(layer.get(name), Mapping) else []
            raise unknown_option("".join([key, *inner[:1]])) if cls is None else no_option_of(cls, key)
        hint, added = known[name].annotation, layer.get(f"{name}+", [])
        if f"{name}+" in layer and not is_list(hint):
            raise ConfigError(f"{key}+: {key} takes one value, and only lists, such as data.train, can be added to")
        value = tree[name] if name in tree else _plain_default(known[name].default)
        if (base := component_in(hint)) and is_list(hint):
            tree[name] = _merge_components(value, layer.get(name, {}), as_list(from_yaml(added)), base, key)
        elif base:
            tree[name] = _merge_component(value, layer[name], hint, base, key)
        elif (group := group_in(hint)) and isinstance(layer[name], Mapping):
            if CLASS in layer[name]:  # --model NAME beside --model.path NAME
                raise not_allowed(key, hint, layer[name][CLASS])
            options = value if isinstance(value, dict) else {}
            tree[name] = _merge_options(options, layer[name], options_of(group), f"{key}.")
        else:
            if isinstance(parts := layer.get(name), _Parts) and isinstance(value, dict):
                layer[name] = {**value, **parts}
            value = _convert(layer[name], hint, key) if name in layer else value
            items = as_list(_convert(added, hint, key)) if added else []
            tree[name] = [*as_list([] if value in (None, Parameter.empty) else value), *items] if items else value
    return tree


def _plain_default(value: Any) -> Any:
    """Return a default as the tree holds it: for a component only the class, as its options also have defaults."""
    if isinstance(value, Component):
        return {**value.spec(), ARGS: {}}
    return [_plain_default(item) for item in value] if isinstance(value, list) else value


def _convert(value: Any, hint: Any, key: str) -> Any:
    try:
        return converted(value, hint)
    except NoValueError as error:
        raise not_allowed(key, hint, error.args[0]) from error


def _merge_components(old: list[Any], new: Any, added: list[Any], base: type[Component], key: str) -> list[Any]:
    """Lay new components over those of a list. Options without a class (`callbacks.every`) are for the last one.

    added  components that follow those
    """
    options = dict(_with_class(new))
    if CLASS in options:
        old = []
        added = [*as_list(from_yaml(options.pop(CLASS))), *added]
    components = [*old, *(_merge_component(None, item, base, base, key) for item in added)]
    if options:
        last = components.pop() if components else None
        components.append(_merge_component(last, options, base, base, key))
    return components


def _merge_component(old: Any, new: Any, hint: Any, base: type[Component], key: str) -> Any:
    """Lay new options over a component; return its class and options, or a plain value that the option takes instead.

    Options without a class are for the class chosen so far. If the class changes, old options stay if it also has them.
    """
    # the new options, in whichever way they are spelled
    options = _by_name(_with_class(new))
    spelled = from_yaml(options.get(CLASS))
    if isinstance(spelled, Mapping):  # --objective '{class_path: SFTMix, mu: 0.1}'
        del options[CLASS]
        options |= _by_name(spelled)
    if isinstance(arguments := options.get(ARGS), Mapping):
        del options[ARGS]
        options = _by_name(options, arguments)
    # the class: the new one, or else the old one
    cls = import_class(old[CLASS]) if isinstance(old, Mapping) else None
    if CLASS in options:
        name = options.pop(CLASS)
        cls = None
        try:
            value = converted(name, hint)
        except NoValueError as error:
            if not isinstance(name, str):
                raise not_allowed(key, hint, name) from error
            cls = find_component(base, name, key, words_of(hint))
        else:
            if not options:
                return value  # such as null
    if cls is None:
        raise ConfigError(
            f"{key} is no {base.__name__} that has options; choose one first, --{key} CLASS: {listed_components(base)}"
        )
    # its options: the old ones that it has, and the new ones over them
    known = options_of(cls)
    args = {name: value for name, value in old[ARGS].items() if name in known} if isinstance(old, Mapping) else {}
    return {CLASS: f"{cls.__module__}.{cls.__qualname__}", ARGS: _merge_options(args, options, known, f"{key}.", cls)}


# ------------------------------------------------------------------------------------------------ building


def _make(value: Any, hint: Any, key: str) -> Any:
    """Make the configuration, a group or a component from plain options; any other value stays as it is."""
    if isinstance(value, list) and component_in(hint):
        return [_make(item, hint, key) for item in value]
    group = group_in(hint)
    if not isinstance(value, Mapping) or not (group or component_in(hint)):
        return value
    cls, options = (group, value) if group else (import_class(value[CLASS]), value[ARGS])
    known, prefix = options_of(cls), f"{key}." if key else ""
    if missing := [f"{prefix}{p.name}" for p in known.values() if p.default is p.empty and p.name not in options]:
        raise ConfigError(f"{key}: {cls.__name__} needs {', '.join(missing)}")
    arguments = {  # without the options of a command, which are in the tree beside a run's
        name: _make(inner, known[name].annotation, f"{prefix}{name}")
        for name, inner in options.items()
        if name in known
    }
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"{key}: {cls.__name__} refused its options: {error}") from error
