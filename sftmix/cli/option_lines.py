"""Options as lines of help: name, explanation and default, from types and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sftmix.components.base import Component
from sftmix.config import RunConfig
from sftmix.config.messages import words_beside_classes
from sftmix.config.schema import (
    alternatives,
    component_bases,
    component_in,
    component_options,
    group_in,
    known_components,
    list_options,
    option_groups,
    option_hints,
)

_NAMES = {"path": "PATH", "train": "FILE", "eval": "FILE", "out": "DIR", "cache_dir": "DIR", "window": "N"}
_TYPES = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
_NO_DEFAULT = (dataclasses.MISSING, inspect.Parameter.empty)
COLUMN = 30
"""Where explanations begin."""


@dataclasses.dataclass(frozen=True, eq=False)
class OwnOption:
    """An option of one command, beside the options of RunConfig. An option of type bool is a flag."""

    name: str
    type: Any
    default: Any
    metavar: str
    doc: str


class Row(NamedTuple):
    """An option in the help: its full key, its form on the command line, its explanation, and its default or ""."""

    key: str
    name: str
    doc: str
    default: str


class Section(NamedTuple):
    """The options of a group or of a component field, under a title; `name` asks for it."""

    name: str
    title: str
    rows: list[Row]


def sections(own: Sequence[OwnOption] = ()) -> list[Section]:
    """Return all options of a command; `own` holds its options beside those of RunConfig."""
    default, docs = RunConfig(), field_docs(RunConfig)
    scalars = [k for k in option_hints() if "." not in k and k not in component_bases()]
    run = [
        *(Row(o.name, f"--{o.name} {o.metavar}".rstrip(), o.doc, _default(o.default)) for o in own),
        Row(
            "config",
            "--config FILE|recipe:NAME",
            "Options from a YAML file or a shipped recipe; those given here win.",
            "",
        ),
        *(_option(k, option_hints()[k], docs[k], getattr(default, k)) for k in scalars),
        Row("print_config", "--print_config", "Print the whole configuration as YAML for --config, and exit.", ""),
    ]
    found = [Section("run", "Run", run)]
    for name, cls in option_groups().items():
        found.append(Section(name, f"{name}: {docs[name]}", list(_group(name, cls, getattr(default, name)))))
    for name, base in component_bases().items():
        found.append(
            Section(
                name,
                f"{name}: {docs[name]}",
                list(_component(name, base, option_hints()[name], getattr(default, name))),
            )
        )
    return found


def option_lines(options: Sequence[Row], column: int = COLUMN) -> Iterator[str]:
    """Return the lines of a list of options: names on the left, explanations on the right."""
    width = _width()
    for _, name, doc, default in options:
        silent = default in ("", "false") or (default == "null" and "null" in doc)
        lines = textwrap.wrap(doc if silent else f"{doc} [{default}]", width - column) or [""]
        if len(name) > column - 4:
            yield f"  {name}"
            name = ""
        yield f"  {name:<{column - 2}}{lines[0]}".rstrip()
        yield from (" " * column + line for line in lines[1:])


def wrapped(text: str) -> str:
    """Return a paragraph in lines of the terminal's width."""
    return textwrap.fill(text, _width())


def _width() -> int:
    return max(min(shutil.get_terminal_size().columns, 118), 78)


def _option(key: str, hint: Any, doc: str, default: Any) -> Row:
    metavar = _metavar(key, hint)
    return Row(key, f"--{key} {metavar}".rstrip(), doc, _default(default))


def _default(value: Any) -> str:
    if value in _NO_DEFAULT or value in ("", [], {}):
        return "required" if value is inspect.Parameter.empty else ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metavar(key: str, hint: Any) -> str:
    name = key.rpartition(".")[2]
    if hint is bool:
        return ""
    if name in _NAMES:
        return _NAMES[name]
    words = []
    for option in (part for part in alternatives(hint) if part is not type(None)):
        if typing.get_origin(option) is typing.Literal:
            words.append("|".join(map(str, typing.get_args(option))))
        elif typing.get_origin(option) in (list, tuple):
            inner = [_TYPES.get(a, "VALUE") for a in typing.get_args(option)]
            words.append(f"[{', '.join(inner if typing.get_origin(option) is tuple else [*inner, '...'])}]")
        elif typing.get_origin(option) is dict:
            words.append("{NAME: ...}")
        else:
            words.append("CLASS" if component_in(option) else _TYPES.get(option, "VALUE"))
    return "|".join(words)


def _group(prefix: str, cls: type, default: Any) -> Iterator[Row]:
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for f in dataclasses.fields(cls):
        key = f"{prefix}.{f.name}"
        if inner := group_in(hints[f.name]):
            yield Row(key, f"--{key}...", docs.get(f.name, ""), "")
            yield from _group(key, inner, inner())
            continue
        more = f" More: --{key}+ {_NAMES.get(f.name, 'TEXT')}." if key in list_options() else ""
        yield _option(key, hints[f.name], docs.get(f.name, "") + more, getattr(default, f.name))


def _component(name: str, base: type[Component], hint: Any, default: Any) -> Iterator[Row]:
    """Yield the line of the class, then the options of the default class."""
    chosen = default[0] if isinstance(default, list) else default
    words = [w for w in words_beside_classes(hint) if w != "null" or chosen is not None]  # else it stands in brackets
    names = [*known_components(base), *words]
    doc = f"One of {', '.join(names)}, or an import path."
    yield Row(
        name, f"--{name} CLASS", doc, type(chosen).__name__ if isinstance(chosen, Component) else _default(chosen)
    )
    if isinstance(chosen, Component):
        yield from component_lines(name, type(chosen))


def component_lines(prefix: str, cls: type) -> Iterator[Row]:
    """Yield the options of one component class under `prefix`, with the options inside groups."""
    docs = component_docs(cls)
    for key, parameter in component_options(cls).items():
        full, hint = f"{prefix}.{key}", parameter.annotation
        if inner := group_in(hint):
            yield Row(full, f"--{full}...", docs.get(key, ""), "")
            yield from _group(full, inner, inner())
        else:
            doc = docs.get(key, "")
            if hint is parameter.empty:
                needed = parameter.default is parameter.empty
                doc += " It has no type" + (f", so nothing sets it: write `{key}: int`." if needed else ": any value.")
            yield _option(full, hint, doc.strip(), parameter.default)


def component_docs(cls: Any) -> dict[str, str]:
    """Return option -> text, from the `name: text` lines of the constructor's docstring."""
    names = "|".join(map(re.escape, component_options(cls)))
    text = inspect.getdoc(cls.__init__) or ""
    parts = re.split(rf"^\s*({names}):\s*", text, flags=re.M) if names else []
    return {name: " ".join(doc.split()) for name, doc in zip(parts[1::2], parts[2::2], strict=True)}


def field_docs(cls: type) -> dict[str, str]:
    """Return field -> the docstring below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(field.target): " ".join(str(ast.literal_eval(text.value)).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
