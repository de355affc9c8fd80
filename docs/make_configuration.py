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

Every option of `run`, `reference`, `confidence`, `split`, `train` and `preview`. The same tree is the YAML of
`--config`, the command line (`--training.epochs 1`), and the dataclass `sftmix.config.RunConfig` in Python. The
defaults are the paper's where it names one. `out`, `model.path` and `data.train` have to be given.

- `--config FILE` or `--config recipe:NAME` is read first, wherever it stands; options on the command line win over it.
- A file may name others, `base: [FILE, recipe:NAME]`, which are applied before it: see [compare](compare.md).
- `--print_config` prints the whole configuration as YAML, and loads nothing. `config.yaml` of a run is the same.
- `--help` shows the options that matter most, `--help all` every one, `--help data` those of one group or component.
- A list takes one value at a time: `--data.train a.json --data.train+ b.json`.
- A component is chosen by its short name or by an import path, and then takes its own options:
  `--pairing LengthMatchedPairs --pairing.window 8`. In YAML it is `class_path` and `init_args`. Where another class
  takes its place, the options of the old one are dropped, but for those that the new one has.
- `--callbacks Evaluate` is a list of one, in YAML too (`callbacks: Evaluate`); `--callbacks+ CLASS` adds one.
- `null` is written as `null`; numbers are decimal (`010` is 10, and `1:30` is no number), and keys are always text.
  Variables as `$SCRATCH` in paths are for the shell: in a file they are not replaced. Keys `x-...` at the top of a file
  are ignored: they are places for anchors.
- Of `training.epochs` and `training.max_steps` the steps decide. One file, variant or command line sets one of them.
- An unknown option, class or value is exit code 2 and names the nearest one that exists.
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
        parts.append(f"## `{option}`: {base.__name__}\n\n{docs[option]} Default: {_default_class(option)}.\n")
        parts += [_component(option, import_class(component.path), classes) for component in shipped[base.__name__]]
    for option, base in NESTED.items():
        parts.append(f"## `{option}` and its like: {base.__name__}\n\n{_first_line(base)}\n")
        parts += [_component(option, import_class(component.path), classes) for component in shipped[base.__name__]]
    return "\n".join(parts)


def _component(option: str, cls: type, classes: dict[str, str]) -> str:
    """A component's first docstring line and the table of its options; groups of options are opened.

    classes  rows of an option -> the first class on the page that has it
    """
    text = [f"**{cls.__name__}** (`{cls.__module__}.{cls.__qualname__}`): {_first_line(cls)}", ""]
    docs, rows, again = option_docs(cls), [], dict[str, list[str]]()
    for name, parameter in options_of(cls).items():
        own = list(_rows(f"{option}.{name}", parameter.annotation, parameter.default, docs.get(name, "")))
        first = classes.setdefault(str(own), cls.__name__)
        if first == cls.__name__:
            rows += own
        else:
            again.setdefault(first, []).append(f"`{name}`")
    text += [f"As in {first}: {', '.join(names)}.\n" for first, names in again.items()]
    return "\n".join([*text, *_lines(rows)]) if rows else "\n".join(text)


def _table(title: str, about: str, rows: Iterator[tuple[str, str, str, str]]) -> str:
    return "\n".join([f"## {title}", "", *([about, ""] if about else []), *_lines(rows)])


def _lines(rows: Any) -> Iterator[str]:
    yield "| option | type | default | what it does |"
    yield "|---|---|---|---|"
    for key, kind, default, doc in rows:
        yield f"| `{key}` | {kind} | {default} | {doc} |"
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
