"""A plain value of YAML, or a word of the command line -> a value of an option's type, or a message.

A message has the key, the value, what is allowed, and the nearest name.
"""

import collections.abc
import types
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin

from sftmix.components.component import Component
from sftmix.config.load import load
from sftmix.config.run_config import RunConfig
from sftmix.config.schema import (
    alternatives,
    component_in,
    group_in,
    listed_components,
    option_hints,
    options_of,
)
from sftmix.words.errors import ConfigError, nearest, with_suggestion
from sftmix.words.given import not_utf8

_WORDS = {
    Literal: "",
    types.NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list [a, b]",
    list: "a list [a, b]",
    collections.abc.Sequence: "a list [a, b]",
    dict: "a mapping {name: value}",
    str: "text",
    Any: "numbers, text, true, false, null, and lists and mappings of these",
}
"""Types that options have, in words. If several would take a text, the first one here gets it."""
EXAMPLES = {
    "contrasts": "[[SFTMix, NTP]]",
    "data.columns": "{response: output_gpt4}",
    "variants": "{NTP: {objective: NTP, pairing: RandomPairs}, SFTMix: {}}",  # NTP in the order of SFTMix
}
"""A value of each option whose form is easily mistaken."""


class Word(str):
    """A word of the command line, which may spell any value; a text of a file is what YAML has made of it before."""


_PLAIN = (Word, str, bool, int, float, types.NoneType, list, tuple, dict)
"""Classes of the values that a file of a run can hold: exactly these, as YAML writes no number of NumPy."""


class NoValueError(Exception):
    """A value that a type does not allow; in a list, the first item that is not allowed."""


def converted(value: Any, hint: Any) -> Any:
    """Return a plain value as the type hint has it; a text may spell any value, as on the command line.

    If several types would take a text, words and numbers are tried before lists, and text last. Without a type only a
    word of the command line spells another value. Raises NoValueError.
    """
    if hint is Any:
        if isinstance(value, (dict, list, tuple)):
            return _collection(dict if isinstance(value, dict) else list, (), value)
        if type(value) not in _PLAIN:
            raise NoValueError(value)
        # --data.template_options.version 3.10 is the number 3.1; version: "3.10" in a file stays text
        return from_yaml(value) if isinstance(value, Word) else value
    kinds = [kind for kind in alternatives(hint) if _type_of(kind) in _WORDS]
    if not (kinds or component_in(hint) or group_in(hint) or isinstance(value, Word)):
        return converted(value, Any)  # for a type that no word can spell: `path: Path` of one's own class
    for kind in sorted(kinds, key=lambda kind: list(_WORDS).index(_type_of(kind))):  # str | None: null is None
        with suppress(ValueError, OverflowError):  # 10 ** 400 is no float
            return _as(kind, value)
    raise NoValueError(value)


def from_yaml(value: Any, *, texts: bool = False) -> Any:
    """Return what a text is to YAML, or the text itself if it is nothing else; any other value as it is.

    texts  as in `load`
    """
    try:
        return load(value, texts=texts) if isinstance(value, str) else value
    except ValueError:
        return str(value)  # "a: b: c" and "[" are no YAML; no Word any more, so it is not read a second time


def _type_of(hint: Any) -> Any:
    return get_origin(hint) or hint


def _as(kind: Any, value: Any) -> Any:
    """Return the value as one type without alternatives; raise ValueError, or NoValueError of an item of a list."""
    origin = _type_of(kind)
    if origin in (dict, list, tuple, collections.abc.Sequence):
        return _collection(origin, get_args(kind), value)
    if kind is str and type(value) in (str, Word):
        return value.encode().decode()  # which raises for what no file of a run can hold, as "\udc80"
    if kind is types.NoneType and value in (None, "null", "~"):
        return None
    parsed = from_yaml(value)
    if origin is Literal:
        for word in get_args(kind):
            # "on" as it is written (YAML: true), "2" as the number 2; by repr 1 is neither true nor 1.0
            if repr(word) in (repr(value), repr(parsed)):
                return word
    elif kind is bool and isinstance(parsed, bool):
        return parsed
    elif kind in (int, float) and type(parsed) in (str, int, kind):  # not isinstance: true is an int to Python
        return kind(parsed)  # 1e-4 is a text to YAML, since it has no point, and so is 010
    raise ValueError


def _collection(origin: Any, inside: tuple[Any, ...], value: Any) -> Any:
    """Return the value as a mapping, a list or a tuple of these types; raise as `_as` does."""
    # {prompt: no} for dict[str, str], [007] for list[str]: no and 007 as they are written; a file has them in quotes
    parsed = from_yaml(value, texts=Any not in inside and any(map(_has_text, inside)))
    if origin is dict and isinstance(parsed, dict):
        of_names, of_values = inside or (str, Any)
        return {_name(name, of_names): converted(item, of_values) for name, item in parsed.items()}
    if origin is dict or not isinstance(parsed, (list, tuple)):
        raise ValueError
    of_any_length = origin is not tuple or inside[1:] == (...,)  # tuple[float, float]: exactly two, or zip raises
    kinds = (inside or (Any,))[:1] * len(parsed) if of_any_length else inside
    items = [converted(item, inner) for item, inner in zip(parsed, kinds, strict=True)]
    return tuple(items) if origin is tuple else items


def _has_text(hint: Any) -> bool:
    """Return True for str, and for collections of it: list[list[str]], dict[str, str | None]."""
    return any(kind is str or any(map(_has_text, get_args(kind)[-1:])) for kind in alternatives(hint))


def _name(value: Any, hint: Any) -> Any:
    """Convert a name of a mapping; `load` makes each text, and in Python it may be a number."""
    return str(value) if hint is str and isinstance(value, (int, float)) else converted(value, hint)


# ------------------------------------------------------------------------------------------------ messages


def words_of(hint: Any) -> list[str]:
    """List in words what a type hint allows, but for components: `float | Schedule | None` -> a number, null."""
    words = choices(hint)
    for kind in alternatives(hint):
        if group := group_in(kind):
            words.append(f"a group of options {{{', '.join(options_of(group))}}}")
        elif component_in(kind) is None:
            words.append(_WORDS.get(_type_of(kind), f"{kind}, which no option can have"))
    return [word for word in words if word]


def not_allowed(key: str, hint: Any, value: Any) -> ConfigError:
    """Return the error for a value that no part of the type hint allows."""
    words, base = words_of(hint), component_in(hint)
    if key == "data.format":
        words.append("and a class of your own by row_format")
    allowed = listed_components(base, words) if base else ", ".join(words)
    example = f"; for example --{key} '{EXAMPLES[key]}'" if key in EXAMPLES else ""
    return ConfigError(
        with_suggestion(
            f"{key}{_fault(value, hint)}", nearest(str(value), choices(hint)), f"allowed: {allowed}{example}"
        )
    )


def _fault(value: Any, hint: Any) -> str:
    """Say why a value is not allowed: above all why YAML makes no collection of a text that was to be one."""
    if value is None or value is True:
        read = "true, as on and yes are to YAML without quotes" if value else "null"
        return f" is {read}, or has no value"
    if _has_text(hint) and not isinstance(value, (str, list, dict)):
        return f": {value!r} is no text to YAML; put it in quotes"  # a number, or a word that is none, as `no`
    if type(value) not in _PLAIN:
        return f" is {value!r}, a {type(value).__name__}; give float(), int(), str() or list() of it"
    if problem := not_utf8(str(value)):
        return f" is {problem}"
    try:
        load(str(value))  # {response: a -> line 1: expected ',' or '}'
    except ValueError as error:
        return f": {value!r} is refused, {error}"
    return f": {value!r} is not allowed"


def choices(hint: Any) -> list[str]:
    """List the words that a type hint allows: `PairSampler | Literal["auto"]` -> auto."""
    return [str(word) for kind in alternatives(hint) if get_origin(kind) is Literal for word in get_args(kind)]


def unknown_option(key: str) -> ConfigError:
    """Return the error for an unknown option of a run, with the one of such a key, or such a last part of it."""
    allowed = ["config", "print_config", "trust", *options_of(RunConfig), *option_hints()]
    by_name = {option.rpartition(".")[2]: option for option in allowed}
    # trainning -> training, data.traim -> data.train; then by the last part: epoch, train.epochs -> training.epochs
    near = nearest(key, option_hints(), cutoff=0.85) or by_name.get(
        nearest(key.rpartition(".")[2], by_name, cutoff=0.7), ""
    )
    return ConfigError(with_suggestion(f"unknown option {key}", near, "--help all lists them"))


def no_option_of(cls: type[Component], key: str) -> ConfigError:
    """Return the error for an option that a component does not have."""
    name, options = key.rpartition(".")[2], list(options_of(cls))
    problem = f"{key}: {cls.__name__} has no option {name!r}"
    return ConfigError(with_suggestion(problem, nearest(name, options), f"it takes {', '.join(options) or 'none'}"))
