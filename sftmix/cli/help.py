"""The help of the commands that take a run's configuration: the options that matter, or all, or one group of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sftmix.cli.option_lines import OwnOption, Row, Section, option_lines, sections, wrapped
from sftmix.common.errors import ConfigError, nearest, told

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
        "data.take": "use so many rows of each source: for a trial",
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
        "checkpoint.keep_best": "keep the model of the best evaluation, too",
    },
    "SFTMix": {
        "objective": "the loss: SFTMix, NTP ...",
        "objective.mu": "weight of the Mixup term",
        "with_baseline": "also train plain NTP, to compare with",
        "reference": "source of the scores",
        "reference.checkpoints": "how often each row is scored",
        "splitter": "the groups: Median, Quantile ...",
    },
}
"""The options that matter most, in groups, each with a few words that leave it on one line."""

_MORE: Mapping[str, Mapping[str, str]] = {
    "preview": {
        "data.columns": "names of your rows' fields, where not ours",
        "data.format": "recognised, or alpaca, messages, sharegpt ...",
        "data.multi_turn": "an example per_turn, or the whole",
        "data.skip_bad": "drop bad rows, and count them",
        "selector": "which rows are used: All, Longest ...",
    },
}
"""Further options about rows that matter to one command."""

_FEW: Mapping[str, Sequence[str]] = {
    "compare": (
        "out",
        "config",
        "print_config",
        "model.path",
        "data.train",
        "data.eval_fraction",
        "training.max_steps",
    ),
    "estimate": (
        *("config", "model.path", "data.train", "data.max_length", "training.epochs", "training.global_batch_size"),
        *("training.micro_batch_size", "model.lora.r", "with_baseline", "reference", "reference.checkpoints"),
    ),
}
"""The options of SHORT that a command with many options of its own shows beside them."""

_SHORT_COLUMN = 34  # where the few words begin

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


def help_text(name: str, usage: str, about: str, topic: str, own: Sequence[OwnOption] = ()) -> str:
    """Return the help of a command; raise ConfigError for an unknown topic.

    topic  "": the options that matter; all: every option; or a group of options, a component field, a single option
    own    the command's options beside those of RunConfig
    """
    there = _read_by(name, sections(own), [option.name for option in own])
    if topic and topic != "all":
        return "\n\n".join([*map(_full, _on(topic, there, name)), "All options: --help all."]) + "\n"
    listed = map(_full, there) if topic else _short(name, there, [option.name for option in own])
    return "\n\n".join([f"usage: {usage}\n\n{about}", *listed, _COMPONENTS if topic else _footer(there)]) + "\n"


def _read_by(name: str, every: Sequence[Section], own: Sequence[str]) -> list[Section]:
    """Return the sections without the options that the command does not read."""
    if name not in READ:
        return list(every)
    kept = [
        section._replace(rows=[row for row in section.rows if _within(row.key, (*READ[name], *own))])
        for section in every
    ]
    return [section for section in kept if section.rows]


def _within(key: str, groups: Sequence[str]) -> bool:
    """Return True if an option is one of the groups, or lies in one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _on(topic: str, there: Sequence[Section], name: str) -> list[Section]:
    """Return the options that a topic asks for: of a whole section, or those at and below a key."""
    for section in there:
        if topic == section.name:
            return [section]
        if rows := [row for row in section.rows if _within(row.key, (topic,))]:
            return [section._replace(rows=rows)]
    topics = [section.name for section in there]
    keys = [row.key for section in there for row in section.rows]
    guess, listed = nearest(topic, topics) or nearest(topic, keys), f"all, {', '.join(topics)}, and each single option"
    raise ConfigError(told(f"{name} has no option or group {topic!r} to help with", guess, f"there are {listed}"))


def _full(section: Section) -> str:
    return "\n".join([section.title, *option_lines(section.rows)])


def _short(name: str, there: Sequence[Section], own: Sequence[str]) -> list[str]:
    """Return the command's own options in full, and those of SHORT that it reads with a line each."""
    rows = {row.key: row for section in there for row in section.rows}
    few = _FEW.get(name, list(rows))
    found = [_full(Section("", name.capitalize(), [rows[key] for key in own]))] if own else []
    for title, texts in SHORT.items():
        more = _MORE.get(name, {}) if "data.train" in texts else {}
        shown = [_on_a_line(rows[key], text) for key, text in {**texts, **more}.items() if key in few]
        if shown:
            found.append("\n".join([title, *option_lines(shown, column=_SHORT_COLUMN)]))
    return found


def _on_a_line(row: Row, text: str) -> Row:
    """Return the row with a few words for its explanation, and one form of its value."""
    option, _, value = row.name.partition(" ")
    form = value.partition("|")[0]
    default = "" if row.default in ("null", "auto") else row.default
    return Row(row.key, f"{option} {'NAME' if form.islower() else form}".rstrip(), text, default)


def _footer(there: Sequence[Section]) -> str:
    number = sum(not row.name.endswith("...") for section in there for row in section.rows)  # not headings of groups
    topics = ", ".join(section.name for section in there)
    return wrapped(f"All {number} options: --help all. One group in full: --help GROUP, of {topics}.")


_COMPONENTS = """\
Components (reference ... callbacks) are chosen by short name or import path (--splitter my_module.Mine)
and take options of their own (--objective.mu 0.1); `components` lists them, `components NAME` shows one."""
