"""The options of a layer as nested mappings, however they were written: `objective.mu: 0.4`, or with braces.

The order of the keys has no meaning, and an option that is given in both ways has one value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.config.schema import component_bases, is_group, list_options, single_as_list
from sftmix.options import as_list

_CLASS, _ARGS = "class_path", "init_args"
_SPEC = {_CLASS, _ARGS}
_OF_LAST = "{}.last"
"""Where the options of the last component of a list stand until it is known which that is."""
_Given = tuple[tuple[str, ...], Any]
"""The keys of an option as they were written, from the outside to the inside, and its value."""


class _Conflict(Exception):
    """Two values for one option."""


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a layer without dots in their keys; raise ConfigError for two values of one option.

    A component that is given options becomes {"class_path", "init_args"}, without a class if the layer names none.
    Options of the components in a list (`callbacks.every`) are those of the last one that the layer names.
    """
    given, found = list(_options(values, ())), dict[str, Any]()
    for place, option in enumerate(given):
        found = _with(found, option, given[:place])
    return _options_of_last(single_as_list(_added(found, "")))


def _with(found: dict[str, Any], option: _Given, before: Sequence[_Given]) -> dict[str, Any]:
    """Return nested options with one more; raise ConfigError if it has another value in those before it."""
    name, value = _tree(option)
    try:
        return {**found, name: _merged(found[name], value, name) if name in found else value}
    except _Conflict:
        other = next((other for other in before if _conflict(other, option)), before[-1])
        both = f"`{_written(other)}` and `{_written(option)}`"
        raise ConfigError(f"{both} give one option two values; write it once") from None


def _conflict(one: _Given, other: _Given) -> bool:
    """Return True if two options are one, with two values."""
    (name, value), (other_name, other_value) = _tree(one), _tree(other)
    try:
        _merged(value, other_value if name == other_name else value, name)
    except _Conflict:
        return True
    return False


def _added(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return options with what is added to a list (`data.train+`) behind what the same layer says the list is."""
    groups = {key: v for key, v in values.items() if is_group(f"{prefix}{key}") and isinstance(v, Mapping)}
    found = {**values, **{key: _added(group, f"{prefix}{key}.") for key, group in groups.items()}}
    for name in [key for key in found if f"{key}+" in found]:
        found[name] = [*_as_items(found[name]), *_as_items(found.pop(f"{name}+"))]
    return found


def _as_items(value: Any) -> list[Any]:
    return [] if value is None else as_list(value)


def _options_of_last(values: dict[str, Any]) -> dict[str, Any]:
    """Give the options of the last component of a list to that component, if the layer names one."""
    for name in _component_lists():
        if (options := values.pop(_OF_LAST.format(name), None)) is not None:
            if not isinstance(given := options[_ARGS], Mapping):
                raise ConfigError(f"{name}.{_ARGS} is {given!r}; write an option of the last as `{name}.OPTION: value`")
            key = next((key for key in (f"{name}+", name) if key in values), None)
            values[key or name] = options if key is None else with_last(_as_items(values[key]), options, name)
    return values


def with_last(components: Sequence[Any], options: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list of components of which the last one has these options ({"init_args"}), too."""
    given = options[_ARGS]
    if not components:
        raise ConfigError(f"{name} is an empty list, so {name}.{next(iter(given), _ARGS)} has no owner; name a class")
    try:
        return [*components[:-1], _merged(components[-1], options, name)]
    except _Conflict:
        both = f"`{name}` and `{name}.{next(iter(given))}`"
        raise ConfigError(f"{both} give one option of the last one two values; write it once") from None


def _component_lists() -> set[str]:
    return list_options() & component_bases().keys()


def _options(values: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[_Given]:
    """Yield the options of a mapping, and of the groups and components inside it."""
    for name, value in values.items():
        names = (*above, str(name))
        if isinstance(value, Mapping) and value and _holds_options(".".join(names), value):
            yield from _options(value, names)
        else:
            yield names, value


def _holds_options(key: str, value: Mapping[str, Any]) -> bool:
    """Return True for a group, and for a component that is its class and its options, or these alone."""
    name = key.removesuffix(f".{_ARGS}")
    if name in _component_lists():  # options of the last one; a class may be put for a key by mistake
        return _CLASS not in value and not any(str(option)[:1].isupper() for option in value)
    if name in component_bases():
        return value.keys() <= _SPEC or not value.keys() & _SPEC
    return is_group(key)


def _tree(option: _Given) -> tuple[str, Any]:
    """Return an option as the key at the top, and the value there in nested mappings."""
    first, *inner = place_of(".".join(option[0]))
    value = option[1]
    if inner[:1] == [_CLASS] and first not in component_bases():
        name = first.removesuffix(".last")
        raise ConfigError(f"{name}.{_CLASS}: {name} is a list; write `{name}: [{value}]`, or `{name}+: [{value}]`")
    for part in reversed(inner):
        value = {part: value}
    return first, value


def place_of(key: str) -> list[str]:
    """Return the keys under which an option stands in nested options: `objective.mu` -> objective, init_args, mu."""
    first, *inner = key.split(".")
    if first in component_bases() and inner:
        name = _OF_LAST.format(first) if first in list_options() else first
        return [name, *([] if inner[0] in _SPEC else [_ARGS]), *inner]
    below = ".".join([first, *inner[:-1]])
    return [first, *inner] if is_group(below) else [key]  # an unknown one is refused by its whole name


def _merged(one: Any, other: Any, name: str) -> Any:
    """Return two values of one option as one: of equal values one, of mappings all keys; raise _Conflict otherwise.

    name  of the field of RunConfig that it is in
    """
    if name.removesuffix(".last") in component_bases():
        one, other = _as_component(one, other), _as_component(other, one)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        both = {key: _merged(one[key], other[key], name) for key in one.keys() & other.keys()}
        return {**one, **other, **both}
    if one != other:
        raise _Conflict
    return one


def _as_component(value: Any, beside: Any) -> Any:
    """Return a value as class and options, where the value beside it tells that it is a component."""
    if isinstance(value, str) and isinstance(beside, Mapping):
        return {_CLASS: value}
    is_spec = isinstance(beside, str) or (isinstance(beside, Mapping) and beside.keys() & _SPEC)
    return {_ARGS: value} if is_spec and isinstance(value, Mapping) and not value.keys() & _SPEC else value


def _written(option: _Given) -> str:
    """Return an option as it stands in the file."""
    *outer, last = option[0]
    text = f"{last}: {'null' if option[1] is None else option[1]}"
    for name in reversed(outer):
        text = f"{name}: {{{text}}}"
    return text
