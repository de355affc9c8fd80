"""The help: options with their explanations and defaults, from the fields of dataclasses and from constructors."""

import argparse
import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any, Literal, NamedTuple, get_origin

from sftmix.config import RunConfig
from sftmix.config.schema import alternatives, component_in, group_in, is_list, listed_components, options_of
from sftmix.config.values import choices, unknown_option

SHORT = {
    "out": "run directory; the same command continues it",
    "config": "options from a YAML file, or recipe:NAME",
    "seed": "of order, pairs, lambdas, held-out rows",
    "print_config": "print all options as YAML, and exit",
    "model.path": "base model: hub id or directory",
    "data.train": "rows: files, directories or hub ids",
    "data.eval_fraction": "share of these rows to hold out, as 0.05",
    "data.eval": "or held-out rows from a file of their own",
    "data.take": "so many rows of each source: for a trial",
    "data.max_length": "tokens per example; longer ones are cut",
    "data.template": "the model's own, or alpaca, chatml, a file",
    "training.learning_rate": "peak, after a warm-up",
    "training.epochs": "passes over the rows",
    "training.max_steps": "or so many optimizer steps",
    "training.global_batch_size": "examples per step, on all GPUs",
    "training.micro_batch_size": "examples at a time on a GPU, at most",
    "model.lora.r": "train LoRA adapters of this rank",
    "checkpoint.keep_best": "keep the best evaluation's model, too",
    "reference": "source of the scores",
    "reference.checkpoints": "how often each row is scored",
    "splitter": "the groups: Median, Quantile ...",
    "objective": "the loss: SFTMix, NTP ...",
    "objective.mu": "weight of the Mixup term",
    "with_baseline": "also train plain NTP, to compare with",
}
"""The options that matter most, with a few words that leave each on one line."""

_NOT_READ = {
    "reference": "objective with_baseline splitter",
    "confidence": "objective with_baseline splitter",
    "split": "objective with_baseline",
    "preview": "objective with_baseline splitter reference training checkpoint out model.lora",
    "compare": "objective with_baseline splitter reference checkpoint",
    "estimate": "objective splitter checkpoint out",
}
"""Options and groups of SHORT that a command has no use for, or has in its variants."""

_NAMES = {"path": "PATH", "train": "FILE", "eval": "FILE", "out": "DIR", "cache_dir": "DIR", "window": "N"}
_FORMS = {
    int: "N",
    float: "X",
    str: "TEXT",
    bool: "true|false",
    Literal: "",
    NoneType: "",
    dict: "{NAME: ...}",
    list: "[A, ...]",
    tuple: "[A, B]",
}


class OwnOption(NamedTuple):
    """An option of one command, beside the options of RunConfig. An option of type bool is a flag."""

    name: str
    annotation: Any
    default: Any
    metavar: str
    doc: str


class HelpRow(NamedTuple):
    """An option in the help: its full key, the form of its value ("" for a flag), and its explanation."""

    key: str
    form: str
    doc: str

    def within(self, keys: Iterable[str]) -> bool:
        """Return True if this is one of these options, or an option inside one."""
        return any(f"{self.key}.".startswith(f"{key}.") for key in keys)


def help_text(name: str, about: str, topic: str, options: Sequence[OwnOption] = ()) -> str:
    """Return the help of a command; raise ConfigError for an unknown topic.

    topic    "": the options that matter; all: every option; or a group of options, a component field, a single option
    options  the command's own options, besides RunConfig's
    """
    own = [HelpRow(o.name, o.metavar, o.doc + _default(o.default, o.doc)) for o in options]
    rows = [
        *own,
        HelpRow("config", "FILE|recipe:NAME", "Options from a YAML file or a shipped recipe; other options win."),
        HelpRow("print_config", "", "Print the whole configuration as YAML for --config, and exit."),
        HelpRow("trust", "", "Import the classes of its own that the config.yaml of a run names, and run their code."),
        *option_rows(RunConfig, ""),
    ]
    heads = {row.key for row in rows if row.form in ("...", "CLASS")}
    groups: dict[str, list[HelpRow]] = {}
    for row in rows:
        group = row.key.partition(".")[0]
        groups.setdefault(group if group in heads else "run", []).append(row)
    usage = f"sftmix {name} [--config FILE] [options]"
    if topic == "all":
        return formatted(groups, usage=usage, description=about, epilog=_COMPONENTS)
    if topic:
        chosen = groups.get(topic) or [row for row in rows if row.within([topic])]
        if not chosen:
            raise unknown_option(topic)
        return formatted({topic: chosen}, usage=argparse.SUPPRESS, epilog="All options: --help all.")
    unread = _NOT_READ.get(name, "").split()
    by_key = {row.key: row for row in rows if not row.within(unread)}
    short = []
    for key in filter(by_key.get, SHORT):  # a few words, the default, and one form of the value
        default = re.search(r" \[(?!null|auto)[^[]*]$", by_key[key].doc)
        form = by_key[key].form.partition("|")[0]
        short.append(HelpRow(key, form, SHORT[key] + (default[0] if default else "")))
    rest = f"All options: --help all. One group in full: --help GROUP, of {', '.join(groups)}."
    return formatted({name: own, "options": short}, usage=usage, description=about, epilog=textwrap.fill(rest, 78))


def option_rows(owner: type, prefix: str) -> Iterator[HelpRow]:
    """Yield the options of a group, a component class or the tree, with all that are inside them."""
    docs = option_docs(owner)
    for name, option in options_of(owner).items():
        key, hint, doc = f"{prefix}{name}", option.annotation, docs.get(name, "")
        if group := group_in(hint):
            yield HelpRow(key, "...", doc)
            yield from option_rows(group, f"{key}.")
        elif (base := component_in(hint)) and owner is RunConfig:
            chosen = option.default[0] if is_list(hint) else option.default
            default = type(chosen).__name__ if isinstance(chosen, base) else chosen
            names = f"One of {listed_components(base, choices(hint))}."
            yield HelpRow(key, "CLASS", f"{doc} {names}{_default(default, doc)}")
            yield from option_rows(type(chosen), f"{key}.") if isinstance(chosen, base) else ()
        else:
            more = f" More: --{key}+ VALUE." if is_list(hint) else ""
            kinds = [] if hint is bool else [get_origin(kind) or kind for kind in alternatives(hint)]  # bool: a flag
            forms = ["CLASS" if component_in(kind) else _FORMS.get(kind, "VALUE") for kind in kinds]
            form = _NAMES.get(name) or "|".join(filter(None, [*forms, *choices(hint)]))
            yield HelpRow(key, form, f"{doc}{more}{_default(option.default, doc)}".strip())


def _default(value: Any, doc: str) -> str:
    """Return the default in brackets, or "" for one that says nothing or is in the explanation."""
    if value is inspect.Parameter.empty:
        return " [required]"
    if value is False or value in ("", [], {}) or (value is None and "null" in doc):
        return ""
    return f" [{value if isinstance(value, str) else json.dumps(value, default=str)}]"


def formatted(parts: Mapping[str, Iterable[HelpRow]], **texts: Any) -> str:
    form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)
    parser = argparse.ArgumentParser(formatter_class=form, add_help=False, **texts)
    for title, rows in parts.items():
        group = parser.add_argument_group(title)
        for key, value, doc in rows:
            action: dict[str, Any] = {"metavar": value} if value else {"action": "store_true"}
            group.add_argument(f"--{key}", help=doc.replace("%", "%%"), **action)
    return parser.format_help()


_COMPONENTS = """\
Components (reference ... callbacks) are chosen by short name or import path (--splitter my_module.Mine)
and take options of their own (--objective.mu 0.1); `components` lists them, `components NAME` shows one."""


def option_docs(owner: Any) -> dict[str, str]:
    """Return option -> text: for a dataclass the docstring below the field, for a component the constructor's lines.

    Such a line is `name: text`.
    """
    if dataclasses.is_dataclass(owner):
        source = inspect.getsource(owner)  # type: ignore[arg-type]
        documented = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, flags=re.M | re.S)
        return {name: " ".join(text.split()) for name, text in documented}
    names = "|".join(map(re.escape, options_of(owner)))
    text = inspect.getdoc(owner.__init__) or ""
    parts = re.split(rf"^\s*({names}):\s*", text, flags=re.M) if names else []
    return {name: " ".join(doc.split()) for name, doc in zip(parts[1::2], parts[2::2], strict=True)}
