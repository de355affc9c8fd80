"""Writes docs/configuration.md from the dataclasses and constructors that define the options.

    python docs/make_configuration.py

A test compares the file with what this writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftmix.cli.help import option_docs
from sftmix.components.component import Component
from sftmix.components.listing import catalogue
from sftmix.config import RunConfig
from sftmix.config.schema import component_bases, group_in, import_class, options_of
from sftmix.tools.listing.command import NESTED

TARGET = Path(__file__).with_name("configuration.md")

_INTRO = """\
# Configuration

<!-- Written by docs/make_configuration.py; edit the docstrings, not this file. -->

The options of `run`, `reference`, `confidence`, `split`, `train` and `preview`: on the command line
(`--training.epochs 1`), in the YAML of `--config`, and in Python as `sftmix.config.RunConfig`. Defaults are the paper's
where it names one. `out`, `model.path` and `data.train` have to be given.

- `--config FILE` or `--config recipe:NAME` is read first; options on the command line win. A file may name others,
  `base: [FILE, recipe:NAME]`, which are applied before it ([compare](compare.md)).
- `--print_config` prints the whole configuration as YAML, and loads nothing. `config.yaml` of a run is the same.
- `--help` shows the options that matter most, `--help all` every one, `--help data` those of one group or component.
- A list takes one value at a time: `--data.train a.json --data.train+ b.json`.
- A component is chosen by its short name or import path, and takes its own options:
  `--pairing LengthMatchedPairs --pairing.window 8`; in YAML `class_path` and `init_args`. If another class takes its
  place, options that the new class lacks are dropped.
- `--callbacks Evaluate` is a list of one, in YAML too (`callbacks: Evaluate`); `--callbacks+ CLASS` adds one.
  Options of callbacks, as `--callbacks.every`, are of the last one named so far, at first of Evaluate.
- `null` means nothing. Numbers are decimal (`010` is 10, `1:30` is no number), keys are text. `$SCRATCH` in a file is
  not replaced. Keys `x-...` at the top of a file are ignored: they are places for anchors.
- `training.max_steps` wins over `training.epochs`. One file, variant or command line sets one of them.
- An unknown option, class or value is exit code 2. The message names the nearest one.
"""


_TOLD = {
    "reference.model.lora": "The options are those of `model.lora.*`.",
    "reference.training": "The options are those of `training.*` but `timeout`, and `seed`; one that excludes "
    "an inherited option sets that aside.",
}
"""Groups whose options stand on the page already, with what is said in their place."""


def configuration() -> str:
    """The whole page."""
    classes: dict[str, str] = {}
    parts = [_INTRO, _table("Run", "", _fields("", RunConfig, _scalars()))]
    docs = option_docs(RunConfig)
    for group, cls in _groups().items():
        parts.append(_table(f"`{group}`", docs[group], _fields(f"{group}.", cls, _names(cls))))
    shipped = dict(catalogue())
    for option, base in component_bases().items():
        if option not in docs:  # of a group, whose table has it
            continue
        about = f"{docs[option]} Default: {_default_class(option)}."
        parts.append(_components(f"`{option}`: {base.__name__}", about, option, shipped[base.__name__], classes))
    for option, base in NESTED.items():
        title = f"`{option}` and its like: {base.__name__}"
        parts.append(_components(title, _first_line(base), option, shipped[base.__name__], classes))
    return "\n".join(parts)


def _components(title: str, about: str, option: str, shipped: Any, classes: dict[str, str]) -> str:
    """The shipped classes of one base in one table: each has a row with its import path, and rows of its options."""
    rows = [row for component in shipped for row in _component(option, import_class(component.path), classes)]
    return _table(title, about, iter(rows)) if rows else f"## {title}\n\n{about}\n"


def _component(option: str, cls: type, classes: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """The row of a component, with its first docstring line, and those of its options; groups of options are opened.

    classes  rows of an option -> the first class on the page that has it
    """
    docs, rows, again = option_docs(cls), [], dict[str, list[str]]()
    for name, parameter in options_of(cls).items():
        own = list(_rows(f"{option}.{name}", parameter.annotation, parameter.default, docs.get(name, "")))
        first = classes.setdefault(str(own), cls.__name__)
        if first == cls.__name__:
            rows += own
        else:
            again.setdefault(first, []).append(f"`{name}`")
    about = " ".join([_first_line(cls), *(f"As in {first}: {', '.join(names)}." for first, names in again.items())])
    return [(f"**{cls.__name__}**", f"`{cls.__module__}.{cls.__qualname__}`", "", about), *rows]


def _table(title: str, about: str, rows: Iterator[tuple[str, str, str, str]]) -> str:
    return "\n".join([f"## {title}", "", *([about, ""] if about else []), *_lines(rows)])


def _lines(rows: Any) -> Iterator[str]:
    yield "| option | type | default | what it does |"
    yield "|---|---|---|---|"
    for key, kind, default, doc in rows:
        yield f"| {key if key.startswith('**') else f'`{key}`'} | {kind} | {default} | {doc} |"
    yield ""


def _fields(prefix: str, cls: Any, names: list[str]) -> Iterator[tuple[str, str, str, str]]:
    docs, default = option_docs(cls), cls()
    hints = typing.get_type_hints(cls)
    for name in names:
        yield from _rows(prefix + name, hints[name], getattr(default, name), docs.get(name, ""))


def _rows(key: str, hint: Any, default: Any, doc: str) -> Iterator[tuple[str, str, str, str]]:
    """The row of an option; for a group of options its row and theirs, unless they are told elsewhere."""
    if (group := group_in(hint)) is None:
        yield key, _kind(hint), _shown(default), doc
        return
    again = _TOLD.get(key, "")
    yield f"{key}.*", "group", "`null`" if default is None else "", f"{doc} {again}".rstrip()
    if again:
        return
    yield from _fields(f"{key}.", group, _names(group))


def _groups() -> dict[str, type]:
    return {name: group for name, o in options_of(RunConfig).items() if (group := group_in(o.annotation))}


def _scalars() -> list[str]:
    return [name for name in _names(RunConfig) if name not in _groups() and name not in component_bases()]


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _kind(hint: Any) -> str:
    """A type as people read it: `int or null`, `cosine, linear, constant`."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is list:
        return f"list[{_kind(*typing.get_args(hint))}]"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _default_class(option: str) -> str:
    value = getattr(RunConfig(), option)
    chosen = value if isinstance(value, list) else [value]
    names = [type(one).__name__ if isinstance(one, Component) else "null" if one is None else one for one in chosen]
    return ", ".join(f"`{name}`" for name in names)


def _shown(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if value in ("", []):
        return ""
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    TARGET.write_text(configuration(), encoding="utf-8")
    print(f"wrote {TARGET.name}")
