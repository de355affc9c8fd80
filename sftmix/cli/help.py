"""The help: options with their explanations and defaults, from the fields of dataclasses and from constructors."""

import argparse
import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

from sftmix.config import RunConfig
from sftmix.config.schema import component_in, group_in, is_list, listed_components, options_of
from sftmix.config.values import choices, unknown_option, words_of

OF_ROWS = """\
  --config FILE                   options from a YAML file, or recipe:NAME
  --seed N                        of order, pairs, lambdas, held-out rows [42]
  --print_config                  print all options as YAML, and exit
  --model.path PATH               base model: hub id or directory
  --data.train FILE               rows: files, directories or hub ids
  --data.eval_fraction X          share of these rows to hold out, as 0.05
  --data.eval FILE                or held-out rows from a file of their own
  --data.limit N                  training rows at most, after holding out
  --data.max_length N             tokens per example; longer ones are cut
  --data.template TEXT            the model's own, or alpaca, chatml, a file
"""
OF_READING = """\
  --data.format WORD              auto, alpaca, messages, sharegpt ... [auto]
  --data.columns MAP              names of fields, as {response: output_gpt4}
  --data.skip_bad                 drop bad rows and count them
  --data.exclude FILE             rows to leave out: ids, or suspects.csv
"""
OF_TRAINING = """\
  --out DIR                       run directory; the same command continues it
  --training.learning_rate X      peak, after a warm-up [2e-06]
  --training.epochs X             passes over the rows [3.0]
  --training.max_steps N          or so many optimizer steps
  --training.global_batch_size N  examples per step, on all GPUs [32]
  --training.micro_batch_size N   examples at a time on a GPU, at most
  --model.lora.r N                train LoRA adapters of this rank
  --reference CLASS               source of the scores [TrainedReference]
  --reference.checkpoints N       how often each row is scored [5]
"""
OF_SPLIT = """\
  --confidence CLASS              of these scores: Perplexity ... [Perplexity]
  --splitter CLASS                the groups: Median, Quantile ... [Median]
"""
OF_TARGET = """\
  --objective CLASS               the loss: SFTMix, NTP ... [SFTMix]
  --objective.mu X                weight of the Mixup term [0.2]
  --with_baseline                 also train plain NTP, to compare with
  --checkpoint.keep_best          keep the best evaluation's model as well
"""
"""The options that matter most, a line each: of the model and the rows, of their reading, of all training, of the
halves, and of the target's alone."""


@dataclasses.dataclass
class NoOptions:
    """The options of a command that has those of a run alone."""


class HelpRow(NamedTuple):
    """An option in the help: its full key, the form of its value ("" for a flag), and its explanation."""

    key: str
    form: str
    doc: str


def help_text(name: str, about: str, topic: str, owner: type = NoOptions) -> str:
    """Return the help of a command; raise ConfigError for an unknown topic.

    topic  "": the options that matter; all: every option; or the key of an option, with those inside it
    owner  dataclass of the command's own options, besides RunConfig's
    """
    own = list(option_rows(owner, ""))
    rows = [
        *own,
        HelpRow("config", "FILE|recipe:NAME", "Options from a YAML file or a shipped recipe; other options win."),
        HelpRow("print_config", "", "Print the whole configuration as YAML for --config, and exit."),
        HelpRow("trust", "", "Import the classes of its own that the config.yaml of a run names, and run their code."),
        *option_rows(RunConfig, ""),
    ]
    usage = f"sftmix {name} [--config FILE] [options]"
    if topic:
        # by the dot, data.train is not data.trained_turns
        chosen = [row for row in rows if topic == "all" or f"{row.key}.".startswith(f"{topic}.")]
        if not chosen:
            raise unknown_option(topic)
        return formatted(topic, chosen, usage=usage, description=about, epilog=_COMPONENTS)
    used = [OF_ROWS, OF_READING] if name == "preview" else [OF_ROWS, OF_TRAINING]
    if name in ("confidence", "split", "run", "train"):
        used.append(OF_SPLIT)
    if name in ("run", "train"):
        used.append(OF_TARGET)
    groups = dict.fromkeys(row.key.partition(".")[0] for row in rows if row.form in ("...", "CLASS"))
    rest = f"All options: --help all. One group in full: --help GROUP, of {', '.join(groups)}."
    short = "\n".join(["options:", "".join(used), textwrap.fill(rest, 78)])
    return formatted(name, own, usage=usage, description=about, epilog=short)


def option_rows(owner: type, prefix: str) -> Iterator[HelpRow]:
    """Yield the options of a group, a component class or the tree, with all that are inside them."""
    docs = option_docs(owner)
    for name, option in options_of(owner).items():
        key, hint, doc = f"{prefix}{name}", option.annotation, docs.get(name, "")
        if group := group_in(hint):
            yield HelpRow(key, "...", doc)
            yield from option_rows(group, f"{key}.")
        elif (base := component_in(hint)) and owner is RunConfig:  # objective.mu, a number or a Schedule, is below
            chosen = option.default[-1] if is_list(hint) else option.default
            default = type(chosen).__name__ if isinstance(chosen, base) else chosen
            names = f"One of {listed_components(base, words_of(hint))}."
            yield HelpRow(key, "CLASS", f"{doc} {names}{_default(default, doc)}")
            yield from option_rows(type(chosen), f"{key}.") if isinstance(chosen, base) else ()
        else:
            more = f" More: --{key}+ VALUE." if is_list(hint) else ""
            form = "" if hint is bool else "|".join(choices(hint)) or "VALUE"  # bool: a flag; auto|fp32|bf16
            yield HelpRow(key, form, f"{doc}{more}{_default(option.default, doc)}".strip())


def _default(value: Any, doc: str) -> str:
    """Return the default in brackets, or "" for one that says nothing or is in the explanation."""
    if value is inspect.Parameter.empty:
        return " [required]"
    # not == False, by which 0.0 would be left out
    if value is False or value in ("", [], {}) or (value is None and "null" in doc):
        return ""
    return f" [{value if isinstance(value, str) else json.dumps(value, default=str)}]"


def formatted(title: str, rows: Iterable[HelpRow], **texts: Any) -> str:
    """Return a help of rows under a title; `texts` are those that argparse.ArgumentParser takes."""
    form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)
    parser = argparse.ArgumentParser(formatter_class=form, add_help=False, **texts)
    group = parser.add_argument_group(title)
    for key, value, doc in rows:
        action: dict[str, Any] = {"metavar": value} if value else {"action": "store_true"}
        group.add_argument(f"--{key}", help=doc.replace("%", "%%"), **action)  # argparse fills in %(default)s
    return parser.format_help()


_COMPONENTS = """\
Components (reference ... callbacks) are chosen by short name or import path (--splitter my_module.Mine)
and take options of their own (--objective.mu 0.1); `components` lists them, `components NAME` shows one."""


@cache
def option_docs(owner: Any) -> dict[str, str]:
    """Return option -> text: for a dataclass the docstring below the field, for a component the constructor's lines.

    Such a line is `name: text`.
    """
    if dataclasses.is_dataclass(owner):
        # Python keeps no docstring of a field. In the source: `    eps: float = 1e-8\n    """AdamW epsilon."""`
        groups = [cls for cls in inspect.getmro(owner)[::-1] if dataclasses.is_dataclass(cls)]  # type: ignore[arg-type]
        source = "".join(map(inspect.getsource, groups))
        documented = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, flags=re.M | re.S)
        return {name: " ".join(text.split()) for name, text in documented}
    names = "|".join(map(re.escape, options_of(owner)))
    text = inspect.getdoc(owner.__init__) or ""
    # "mu: weight ...\nalpha: parameter ..." -> ["", "mu", "weight ...\n", "alpha", "parameter ..."]
    parts = re.split(rf"^\s*({names}):\s*", text, flags=re.M) if names else []
    return {name: " ".join(doc.split()) for name, doc in zip(parts[1::2], parts[2::2], strict=True)}
