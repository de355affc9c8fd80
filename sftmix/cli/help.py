"""The help: options as lines, made of their types and docstrings, and the list of components."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sftmix.common.errors import ConfigError, nearest, told
from sftmix.components.base import Component
from sftmix.components.listing import catalogue
from sftmix.config import RunConfig
from sftmix.config.classes import find_class
from sftmix.config.messages import words_beside_classes
from sftmix.config.schema import (
    alternatives,
    chosen_by,
    component_bases,
    component_in,
    component_options,
    group_in,
    import_class,
    known_components,
    list_options,
    nested_bases,
    type_hints,
)

SHORT: Mapping[str, str] = {
    "out": "run directory; the same command continues it",
    "config": "options from a YAML file, or recipe:NAME",
    "seed": "of order, pairs, lambdas, held-out rows",
    "print_config": "print all options as YAML, and exit",
    "model.path": "base model: hub id or directory",
    "data.train": "rows: files, directories or hub ids",
    "data.eval_fraction": "share of these rows to hold out, as 0.05",
    "data.eval": "or held-out rows from a file of their own",
    "data.take": "use so many rows of each source: for a trial",
    "data.max_length": "tokens per example; longer ones are cut",
    "data.template": "the model's own, or alpaca, chatml, a file",
    "training.learning_rate": "peak, after a warm-up",
    "training.epochs": "passes over the rows",
    "training.max_steps": "or so many optimizer steps",
    "training.global_batch_size": "examples per step, on all GPUs",
    "training.micro_batch_size": "examples at a time on each GPU; null: 8",
    "model.lora.r": "train LoRA adapters of this rank",
    "checkpoint.keep_best": "keep the model of the best evaluation, too",
    "objective": "the loss: SFTMix, NTP ...",
    "objective.mu": "weight of the Mixup term",
    "with_baseline": "also train plain NTP, to compare with",
    "reference": "source of the scores",
    "reference.checkpoints": "how often each row is scored",
    "splitter": "the groups: Median, Quantile ...",
    "selector": "which rows are used: All, Longest ...",
}
"""The options that matter most, with a few words that leave each on one line."""

_OF_REFERENCE = (
    *("config", "out", "seed", "print_config", "model", "data", "training", "checkpoint.every"),
    *("checkpoint.keep", "reference", "selector", "optimizer", "callbacks"),
)
READ: Mapping[str, Sequence[str]] = {
    "preview": ("config", "seed", "model.path", "data", "selector"),
    "reference": _OF_REFERENCE,
    "confidence": (*_OF_REFERENCE, "confidence"),
    "split": (*_OF_REFERENCE, "confidence", "splitter"),
}
"""Options and groups that a command reads, beside its own; a command that is not named here reads all of a run's."""

_NAMES = {"path": "PATH", "train": "FILE", "eval": "FILE", "out": "DIR", "cache_dir": "DIR", "window": "N"}
_TYPES = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
_COMPONENTS = """\
Components (reference ... callbacks) are chosen by short name or import path (--splitter my_module.Mine)
and take options of their own (--objective.mu 0.1); `components` lists them, `components NAME` shows one."""


@dataclasses.dataclass(frozen=True, eq=False)
class OwnOption:
    """An option of one command, beside the options of RunConfig. An option of type bool is a flag."""

    name: str
    type: Any
    default: Any
    metavar: str
    doc: str


class Row(NamedTuple):
    """An option in the help: its full key, the form of its value, its explanation, and its default or ""."""

    key: str
    form: str
    doc: str
    default: str = ""


def help_text(name: str, usage: str, about: str, topic: str, own: Sequence[OwnOption] = ()) -> str:
    """Return the help of a command; raise ConfigError for an unknown topic.

    topic  "": the options that matter; all: every option; or a group of options, a component field, a single option
    own    the command's options beside those of RunConfig
    """
    mine = [option.name for option in own]
    sections = _sections(own)
    if name in READ:
        sections = {
            title: [r for r in rows if _within(r.key, (*READ[name], *mine))] for title, rows in sections.items()
        }
    names = [title.partition(":")[0].lower() for title, rows in sections.items() if rows]
    if topic and topic != "all":
        shown = _on(topic, sections, names, name)
        return "\n\n".join([_section(title, rows) for title, rows in shown] + ["All options: --help all."]) + "\n"
    number = sum(row.form != "..." for rows in sections.values() for row in rows)
    more = f"All {number} options: --help all. One group in full: --help GROUP, of {', '.join(names)}."
    footer = _COMPONENTS if topic else textwrap.fill(more, _width())
    if not topic:
        short = [row._replace(doc=SHORT.get(row.key, row.doc)) for rows in sections.values() for row in rows]
        few = list(SHORT)[: 12 if len(own) > 6 else None]
        short = [row for row in short if row.key in few or row.key in mine]
        sections = {"Options" if name != "run" else "Run": [_on_a_line(row) for row in short]}
    parts = [_section(title, rows, 30 if topic else 34) for title, rows in sections.items() if rows]
    return "\n\n".join([f"usage: {usage}\n\n{about}", *parts, footer]) + "\n"


def _on(
    topic: str, sections: Mapping[str, list[Row]], names: Sequence[str], command: str
) -> list[tuple[str, list[Row]]]:
    """Return the options that a topic asks for: of a whole section, or those at and below a key."""
    for title, rows in sections.items():
        chosen = rows if title.partition(":")[0].lower() == topic else [r for r in rows if _within(r.key, (topic,))]
        if chosen:
            return [(title, chosen)]
    keys = [row.key for rows in sections.values() for row in rows]
    guess, listed = nearest(topic, names) or nearest(topic, keys), f"all, {', '.join(names)}, and each single option"
    raise ConfigError(told(f"{command} has no option or group {topic!r} to help with", guess, f"there are {listed}"))


def _within(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _on_a_line(row: Row) -> Row:
    form = row.form.partition("|")[0]
    default = "" if row.default in ("null", "auto") else row.default
    return row._replace(form="NAME" if form.islower() else form, default=default)


# -------------------------------------------------------------------------------------------------- lines


def _section(title: str, rows: Sequence[Row], column: int = 30) -> str:
    """Return a title and the lines of its options: names on the left, explanations on the right."""
    lines = [title]
    for key, form, doc, default in rows:
        name = f"--{key}..." if form == "..." else f"--{key} {form}".rstrip()
        silent = default in ("", "false") or (default == "null" and "null" in doc)
        first, *others = textwrap.wrap(doc if silent else f"{doc} [{default}]", _width() - column) or [""]
        if len(name) > column - 4:
            lines.append(f"  {name}")
            name = ""
        lines += [f"  {name:<{column - 2}}{first}".rstrip(), *(" " * column + other for other in others)]
    return "\n".join(lines)


def _width() -> int:
    return max(min(shutil.get_terminal_size().columns, 118), 78)


def _sections(own: Sequence[OwnOption]) -> dict[str, list[Row]]:
    """Return title -> options: of the run, of each group, of each component field."""
    default, docs = RunConfig(), field_docs(RunConfig)
    run = [Row(o.name, o.metavar, o.doc, _default(o.default)) for o in own]
    run.append(Row("config", "FILE|recipe:NAME", "Options from a YAML file or a shipped recipe; those given here win."))
    sections = {"Run": run}
    for name, hint in type_hints(RunConfig).items():
        value, title = getattr(default, name), f"{name}: {docs[name]}"
        if component_in(hint):
            sections[title] = list(_component(name, hint, value))
        elif group := group_in(hint):
            sections[title] = list(_group(name, group, value))
        else:
            run += _rows(name, hint, docs[name], value)
    run.append(Row("print_config", "", "Print the whole configuration as YAML for --config, and exit."))
    return sections


def _group(prefix: str, cls: type, default: Any) -> Iterator[Row]:
    docs = field_docs(cls)
    for name, hint in type_hints(cls).items():
        yield from _rows(f"{prefix}.{name}", hint, docs.get(name, ""), getattr(default, name))


def _rows(key: str, hint: Any, doc: str, default: Any) -> Iterator[Row]:
    """Yield the line of an option; of a group a heading and its options."""
    if group := group_in(hint):
        yield Row(key, "...", doc)
        yield from _group(key, group, group())
        return
    more = f" More: --{key}+ {_NAMES.get(key.rpartition('.')[2], 'TEXT')}." if key in list_options() else ""
    yield Row(key, _form(key, hint), doc + more, _default(default))


def _component(name: str, hint: Any, default: Any) -> Iterator[Row]:
    """Yield the line of the class, then the options of the default class."""
    chosen = default[0] if isinstance(default, list) else default
    words = [w for w in words_beside_classes(hint) if w != "null" or chosen is not None]  # else it stands in brackets
    names = ", ".join([*known_components(component_bases()[name]), *words])
    shown = type(chosen).__name__ if isinstance(chosen, Component) else _default(chosen)
    yield Row(name, "CLASS", f"One of {names}, or an import path.", shown)
    if isinstance(chosen, Component):
        yield from _of_class(name, type(chosen))


def _of_class(prefix: str, cls: type) -> Iterator[Row]:
    """Yield the options of one component class."""
    docs = component_docs(cls)
    for key, parameter in component_options(cls).items():
        doc = docs.get(key, "")
        if parameter.annotation is parameter.empty:
            needed = parameter.default is parameter.empty
            doc += " It has no type" + (f", so nothing sets it: write `{key}: int`." if needed else ": any value.")
        yield from _rows(f"{prefix}.{key}", parameter.annotation, doc.strip(), parameter.default)


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value or "") if value != 0 else "0"


def _form(key: str, hint: Any) -> str:
    """Return how the value of an option is written: `N`, `cosine|linear`, `[TEXT, ...]`."""
    if hint is bool:
        return ""
    if key.rpartition(".")[2] in _NAMES:
        return _NAMES[key.rpartition(".")[2]]
    forms: list[str] = []
    for kind in alternatives(hint):
        origin, inner = typing.get_origin(kind), [_TYPES.get(a, "VALUE") for a in typing.get_args(kind)]
        if origin is typing.Literal:
            forms += map(str, typing.get_args(kind))
        elif origin in (list, tuple):
            forms.append(f"[{', '.join([*inner, '...'] if origin is list else inner)}]")
        elif kind is not type(None):
            forms.append(
                "{NAME: ...}" if origin is dict else "CLASS" if component_in(kind) else _TYPES.get(kind, "VALUE")
            )
    return "|".join(forms)


# --------------------------------------------------------------------------------------------- components


def components_overview() -> str:
    """List every component under the option that chooses it, one line each."""
    parts, shipped = [], dict(catalogue())
    for option, base in _kinds():
        title = f"--{option}  ({base.__name__}: {(inspect.getdoc(base) or '').partition(chr(10))[0]})"
        lines = [f"  {component.name:<20} {component.doc}" for component in shipped.get(base.__name__, [])]
        parts.append("\n".join([title, *lines]))
    more = "`components NAME` shows one with its options. Your own: subclass the base class, choose it by import path."
    return "\n\n".join([*parts, more]) + "\n"


def component_details(name: str) -> str:
    """Describe a component, by short name or import path: its docstring, its import path and its options.

    Several of one name are all described.
    """
    if "." in name:
        classes = [find_class(name)]
    else:
        shipped = [one for _, several in catalogue() for one in several]
        classes = [import_class(one.path) for one in shipped if one.name == name]
        if not classes:
            names = list(dict.fromkeys(one.name for one in shipped))
            raise ConfigError(told(f"no component {name!r}", nearest(name, names), f"there are {', '.join(names)}"))
    parts = []
    for cls in classes:
        for option, base in _kinds():
            if inspect.isclass(cls) and issubclass(cls, base):
                title = f"{cls.__name__}  ({cls.__module__}.{cls.__qualname__}), chosen by --{option} {chosen_by(cls)}"
                parts.append(
                    _section(f"{title}\n\n{inspect.getdoc(cls) or ''}\n", list(_of_class(option, cls))).rstrip()
                )
    if not parts:
        listed = ", ".join(base.__name__ for _, base in _kinds())
        raise ConfigError(f"{name} is no component: no subclass of a base class in sftmix.components ({listed})")
    return "\n\n".join(parts) + "\n"


def _kinds() -> list[tuple[str, type[Component]]]:
    return [*component_bases().items(), *nested_bases().items()]


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
