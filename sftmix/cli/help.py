"""The help: options with their explanations and defaults, from the fields of dataclasses and from constructors."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from sftmix.common.errors import ConfigError, nearest, told
from sftmix.components.base import Component
from sftmix.components.listing import catalogue
from sftmix.config import RunConfig
from sftmix.config.classes import chosen_by, find_component, import_class, listed, nested_bases
from sftmix.config.schema import alternatives, component_bases, component_in, group_in, is_list, options_of
from sftmix.config.values import choices

SHORT: Mapping[str, Mapping[str, str]] = {
    "Run": {
        "out": "run directory; the same command continues it",
        "config": "options from a YAML file, or recipe:NAME",
        "seed": "of order, pairs, lambdas, held-out rows",
        "print_config": "print all options as YAML, and exit",
    },
    "Model and rows": {
        "model.path": "base model: hub id or directory",
        "data.train": "rows: files, directories or hub ids",
        "data.eval_fraction": "share of these rows to hold out, as 0.05",
        "data.eval": "or held-out rows from a file of their own",
        "data.take": "so many rows of each source: for a trial",
        "data.max_length": "tokens per example; longer ones are cut",
        "data.template": "the model's own, or alpaca, chatml, a file",
    },
    "Training": {
        "training.learning_rate": "peak, after a warm-up",
        "training.epochs": "passes over the rows",
        "training.max_steps": "or so many optimizer steps",
        "training.global_batch_size": "examples per step, on all GPUs",
        "training.micro_batch_size": "examples at a time on each GPU; null: 8",
        "model.lora.r": "train LoRA adapters of this rank",
        "checkpoint.keep_best": "keep the best evaluation's model, too",
    },
    "Split": {
        "reference": "source of the scores",
        "reference.checkpoints": "how often each row is scored",
        "splitter": "the groups: Median, Quantile ...",
    },
    "SFTMix": {
        "objective": "the loss: SFTMix, NTP ...",
        "objective.mu": "weight of the Mixup term",
        "with_baseline": "also train plain NTP, to compare with",
    },
}
"""The options that matter most, in groups, each with a few words that leave it on one line."""

_BEFORE_TRAINING = ("Run", "Model and rows", "Training", "Split")
_GROUPS = {
    "reference": _BEFORE_TRAINING,
    "confidence": _BEFORE_TRAINING,
    "split": _BEFORE_TRAINING,
    "preview": ("Model and rows",),
    "compare": ("Run", "Model and rows"),
    "estimate": ("Model and rows", "Training", "Split"),
}
"""The groups of SHORT that a command shows; one that is not named here shows all."""

_NAMES = {"path": "PATH", "train": "FILE", "eval": "FILE", "out": "DIR", "cache_dir": "DIR", "window": "N"}
_FORMS = {int: "N", float: "X", str: "TEXT", bool: "true|false", dict: "{NAME: ...}", list: "[A, ...]", tuple: "[A, B]"}


@dataclasses.dataclass(frozen=True, eq=False)
class OwnOption:
    """An option of one command, beside the options of RunConfig. An option of type bool is a flag."""

    name: str
    type: Any
    default: Any
    metavar: str
    doc: str


class Row(NamedTuple):
    """An option in the help: its full key, the form of its value ("" for a flag), and its explanation."""

    key: str
    form: str
    doc: str


class Section(NamedTuple):
    """The options of a group or of a component field."""

    title: str
    about: str
    rows: list[Row]


def help_text(name: str, about: str, topic: str, own: Sequence[OwnOption] = ()) -> str:
    """Return the help of a command; raise ConfigError for an unknown topic.

    topic  "": the options that matter; all: every option; or a group of options, a component field, a single option
    own    the command's options beside those of RunConfig
    """
    sections, usage = _sections(own), f"sftmix {name} [--config FILE] [options]"
    if topic == "all":
        return _formatted(sections, usage=usage, description=about, epilog=_COMPONENTS)
    if topic:
        return _formatted(_on(topic, sections), usage=argparse.SUPPRESS, epilog="All options: --help all.")
    rows = {row.key: row for section in sections for row in section.rows}
    short = [Section(name.capitalize(), "", [rows[option.name] for option in own])] if own else []
    for title in _GROUPS.get(name, tuple(SHORT)):
        lines = [_on_a_line(rows[key], text) for key, text in SHORT[title].items()]
        short.append(Section(title, "", lines))
    groups = ", ".join(section.title for section in sections)
    rest = textwrap.fill(f"All options: --help all. One group in full: --help GROUP, of {groups}.", 78)
    return _formatted(short, usage=usage, description=about, epilog=rest)


def _sections(own: Sequence[OwnOption]) -> list[Section]:
    """Return all options of a command."""
    docs, groups, run = option_docs(RunConfig), list[Section](), list[Row]()
    run += [Row(o.name, o.metavar, o.doc + _default(o.default, o.doc)) for o in own]
    run.append(Row("config", "FILE|recipe:NAME", "Options from a YAML file or a shipped recipe; those given here win."))
    for name, option in options_of(RunConfig).items():
        if group := group_in(option.annotation):
            groups.append(Section(name, docs[name], list(option_rows(group, f"{name}."))))
        elif base := component_in(option.annotation):
            chosen = option.default[0] if is_list(option.annotation) else option.default
            default = type(chosen).__name__ if isinstance(chosen, Component) else chosen
            doc = f"One of {listed(base, choices(option.annotation))}."
            rows = [Row(name, "CLASS", doc + _default(default, doc))]
            rows += option_rows(type(chosen), f"{name}.") if isinstance(chosen, Component) else ()
            groups.append(Section(name, docs[name], rows))
        else:
            run.append(_row(name, option, docs[name]))
    run.append(Row("print_config", "", "Print the whole configuration as YAML for --config, and exit."))
    return [Section("run", "", run), *groups]


def option_rows(owner: type, prefix: str) -> Iterator[Row]:
    """Yield the options of a group or of a component class under a prefix, with those of the groups inside it."""
    docs = option_docs(owner)
    for name, option in options_of(owner).items():
        if group := group_in(option.annotation):
            yield Row(f"{prefix}{name}", "...", docs.get(name, ""))
            yield from option_rows(group, f"{prefix}{name}.")
        else:
            yield _row(f"{prefix}{name}", option, docs.get(name, ""))


def _row(key: str, option: inspect.Parameter, doc: str) -> Row:
    hint, forms = option.annotation, list[str]()
    if hint is option.empty:
        doc += " It has no type: any value."
    for kind in alternatives(hint) if hint is not bool else ():
        if typing.get_origin(kind) is typing.Literal:
            forms.append("|".join(map(str, typing.get_args(kind))))
        elif kind is not type(None):
            form = _FORMS.get(typing.get_origin(kind) or kind, "VALUE")
            forms.append("CLASS" if component_in(kind) else form)
    form = "" if hint is bool else _NAMES.get(option.name) or "|".join(forms)
    more = f" More: --{key}+ {form.rpartition('|')[2]}." if is_list(hint) else ""
    return Row(key, form, (doc + more + _default(option.default, doc)).strip())


def _default(value: Any, doc: str) -> str:
    """Return the default in brackets, or "" for one that says nothing or stands in the explanation."""
    if value is inspect.Parameter.empty:
        return " [required]"
    if value is False or value in ("", [], {}) or (value is None and "null" in doc):
        return ""
    return f" [{value if isinstance(value, str) else json.dumps(value, default=str)}]"


def _on(topic: str, sections: Sequence[Section]) -> list[Section]:
    """Return the options that a topic asks for: of a whole section, or those at and below a key."""
    for title, about, rows in sections:
        within = rows if title == topic else [row for row in rows if f"{row.key}.".startswith(f"{topic}.")]
        if within:
            return [Section(title, about, within)]
    names = [section.title for section in sections]
    guess = nearest(topic, names) or nearest(topic, [row.key for section in sections for row in section.rows])
    listed_names = f"there are all, {', '.join(names)}, and each single option"
    raise ConfigError(told(f"no option or group {topic!r} to help with", guess, listed_names))


def _on_a_line(row: Row, text: str) -> Row:
    """Return the row with a few words for its explanation, and one form of its value."""
    default = re.search(r" \[(?!null|auto)[^[]*]$", row.doc)
    return Row(row.key, row.form.partition("|")[0], text + (default[0] if default else ""))


def _formatted(sections: Iterable[Section], **texts: Any) -> str:
    form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)
    parser = argparse.ArgumentParser(formatter_class=form, add_help=False, **texts)
    for title, about, rows in sections:
        group = parser.add_argument_group(title, about or None)
        for key, value, doc in rows:
            text = doc.replace("%", "%%")
            if value:
                group.add_argument(f"--{key}", metavar=value, help=text)
            else:
                group.add_argument(f"--{key}", action="store_true", help=text)
    return parser.format_help()


_COMPONENTS = """\
Components (reference ... callbacks) are chosen by short name or import path (--splitter my_module.Mine)
and take options of their own (--objective.mu 0.1); `components` lists them, `components NAME` shows one."""


def option_docs(owner: Any) -> dict[str, str]:
    """Return option -> text: of a dataclass the docstring below the field, of a component the constructor's lines.

    Such a line is `name: text`.
    """
    if dataclasses.is_dataclass(owner):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined,arg-type]
        return {
            ast.unparse(field.target): " ".join(str(ast.literal_eval(text.value)).split())
            for field, text in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
    names = "|".join(map(re.escape, options_of(owner)))
    text = inspect.getdoc(owner.__init__) or ""
    parts = re.split(rf"^\s*({names}):\s*", text, flags=re.M) if names else []
    return {name: " ".join(doc.split()) for name, doc in zip(parts[1::2], parts[2::2], strict=True)}


# ---------------------------------------------------------------------------------------------- components


def overview() -> str:
    """List every component under the option that chooses it, one line each."""
    lines, shipped = [], dict(catalogue())
    for option, base in (component_bases() | nested_bases()).items():
        lines.append(f"--{option}  ({base.__name__}: {(inspect.getdoc(base) or '').partition(chr(10))[0]})")
        lines += [f"  {component.name:<20} {component.doc}" for component in shipped[base.__name__]]
        lines.append("")
    more = "`components NAME` shows one with its options. Your own: subclass the base class, choose it by import path."
    return "\n".join([*lines, more]) + "\n"


def details(name: str) -> str:
    """Describe a component: its docstring, its import path and its options; all shipped components of a short name."""
    paths = [component.path for _, components in catalogue() for component in components if component.name == name]
    classes = [import_class(path) for path in paths] or [find_component(Component, name)]
    texts = []
    for cls in classes:
        for option, base in (component_bases() | nested_bases()).items():
            if issubclass(cls, base):
                title = f"{cls.__name__}  ({cls.__module__}.{cls.__qualname__}), chosen by --{option} {chosen_by(cls)}"
                rows = Section("options", "", list(option_rows(cls, f"{option}.")))
                about = f"{title}\n\n{inspect.getdoc(cls) or ''}"
                texts.append(_formatted([rows], usage=argparse.SUPPRESS, description=about))
    return "\n".join(texts)
