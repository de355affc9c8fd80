"""Messages about a wrong option: the key, the value, what is allowed, and the nearest name."""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import types
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin

from sftmix.common.errors import did_you_mean, nearest, told
from sftmix.components.base import Component
from sftmix.config.schema import alternatives, component_in, known_components, option_groups, option_hints

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list [a, b]",
    collections.abc.Sequence: "a list [a, b]",
    dict: "a mapping {name: value}",
    types.NoneType: "null",
}
EXAMPLES = {
    "contrasts": "[[SFTMix, NTP]]",
    "data.columns": "{response: output_gpt4}",
    "variants": "{NTP: {objective: NTP, pairing: RandomPairs}, SFTMix: {}}",  # NTP in the order of SFTMix
}
"""A value of each option whose form is easily mistaken."""
ELSEWHERE = {
    "model.path": ("model_name_or_path", "base_model"),
    "model.lora.r": ("rank", "lora_r", "lora_rank", "adapter", "finetuning_type"),
    "model.lora.quantize": ("load_in_4bit",),
    "data.train": ("dataset", "datasets", "dataset_name"),
    "data.eval_fraction": ("val_size", "val_set_size"),
    "data.max_length": ("sequence_len", "cutoff_len"),
    "data.limit": ("max_samples",),
    "training.epochs": ("num_epochs", "num_train_epochs"),
    "training.global_batch_size": ("gradient_accumulation_steps",),
    "training.learning_rate": ("lr",),
    "training.warmup_ratio": ("warmup_steps",),
    "training.parallel": ("deepspeed",),
    "checkpoint.every": ("save_steps",),
    "out": ("output_dir",),
    "callbacks": ("eval_steps", "report_to"),
}
"""Options -> what TRL, axolotl and LLaMA-Factory call them, where the names are not alike."""
_LISTED = 12
"""Most options of a group that a message lists."""


def unknown_option(key: str) -> str:
    """Return the message for an unknown option, with the one that was probably meant."""
    allowed = [*option_hints(), *option_groups(), "config", "print_config"]
    group, _, wanted = key.rpartition(".")
    siblings = [k for k in allowed if k.startswith(f"{key.partition('.')[0]}.")] if group else []
    more = f"--help {key.partition('.')[0] if siblings else 'all'} lists them"
    if 0 < len(siblings) <= _LISTED:
        more = f"there are {', '.join(siblings)}"
    guess = next((option for option, names in ELSEWHERE.items() if wanted in names), "")
    for option in [*allowed, *siblings]:
        if wanted in choices(option_hints().get(option)):
            guess = f"{option} {wanted}"
    return told(f"unknown option {key}", did_you_mean(guess or _nearest_option(key, siblings, allowed)), more)


def _nearest_option(key: str, siblings: Sequence[str], allowed: Sequence[str]) -> str:
    """Return the option whose last part is most like that of the key, or begins as it; of its group, if there is one.

    The last parts are compared alone, since those before them are alike in all options of a group.
    """
    wanted = key.rpartition(".")[2]

    def likeness(option: str) -> tuple[float, float]:
        name = option.rpartition(".")[2]
        alike = max(_ratio(wanted, name), 0.7 * name.startswith(wanted))
        return (alike + 0.1 * (option in siblings) if alike >= _ALIKE else 0.0), _ratio(key, option)

    best = max(allowed, key=likeness)
    return best if likeness(best)[0] else ""


_ALIKE = 0.6
"""Least likeness of two names, in [0, 1], of which one is suggested for the other."""


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def no_option_of(cls: type[Component], name: str, key: str, options: Sequence[str]) -> str:
    """Return the message for an option that a component does not have; `key` is that of the component."""
    if name[:1].isupper():
        form = f"{{class_path: {name}, init_args: {{option: value}}}}"
        return f"{key}: {name} is no option; if it is the class, write {form}"
    problem = f"{key}.{name}: {cls.__name__} has no option {name!r}"
    return told(problem, nearest(name, options), f"it takes {', '.join(options) or 'none'}")


def not_allowed(key: str, hint: Any, value: Any) -> str:
    """Return the message for a value that no part of the type hint allows."""
    kinds, base = alternatives(hint), component_in(hint)
    if base is not None:
        article = "an" if base.__name__[0] in "AEIOU" else "a"
        forms = [*(_WORDS[kind] for kind in kinds if kind in _WORDS), f"{article} {base.__name__}"]
        near = nearest(str(value), known_components(base)) if value is not None else ""
        shown = "null" if value is None else repr(value)
        return told(f"{key}: {shown} is not {' or '.join(forms)}", near, f"there are {listed(base)}")
    if any(kind for kind in kinds if word_of(kind) is None):
        allowed = "int, float, str, bool, list, dict, Literal, a dataclass, or a component"
        return f"{key}: its type is {getattr(hint, '__name__', hint)}, which no option can have; allowed: {allowed}"
    of_words = choices(hint)
    allowed = ", ".join([*of_words, *(str(word_of(kind)) for kind in kinds if get_origin(kind) is not Literal)])
    shown = f"{key} is null, or has no value" if value is None else f"{key}: {value!r} {_fault(value, kinds)}"
    example = f"; for example --{key} '{EXAMPLES[key]}'" if key in EXAMPLES else ""
    return told(shown, nearest(str(value), of_words), f"allowed: {allowed}{example}")


def listed(base: type[Component]) -> str:
    """List the components of a kind for a message."""
    return f"{', '.join(known_components(base))}, or an import path"


def _fault(value: Any, kinds: Sequence[Any]) -> str:
    """Say why a value is not allowed: above all why YAML makes no collection of a text that was to be one."""
    import yaml

    if not isinstance(value, str):
        other = str in kinds and not isinstance(
            value, (list, dict)
        )  # a number, or a word that is none to YAML, as `no`
        return "is no text to YAML; put it in quotes" if other else "is not allowed"
    if not any(is_dataclass(kind) or (get_origin(kind) or kind) in (dict, list, tuple) for kind in kinds):
        return "is not allowed"
    try:
        return "is a text" if isinstance(yaml.safe_load(value), str) else "is not allowed"
    except yaml.YAMLError as error:
        problem = str(getattr(error, "problem", "it has characters that YAML does not read"))
        return "is no YAML: " + problem.replace("but got '<stream end>'", "but it ends there")


def choices(hint: Any) -> list[str]:
    """List the words that a type hint allows: `PairSampler | Literal["auto"]` -> auto."""
    literals = [kind for kind in alternatives(hint) if get_origin(kind) is Literal]
    return [str(word) for literal in literals for word in get_args(literal)]


def words_beside_classes(hint: Any) -> list[str]:
    """List the words that a field takes in place of a class: `PairSampler | Literal["auto"] | None` -> auto, null."""
    return [*choices(hint), *(["null"] if types.NoneType in alternatives(hint) else [])]


def word_of(hint: Any) -> str | None:
    """Return the words for one type, or None for a type that no option can have."""
    if is_dataclass(hint):
        return "a group {option: value}"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} values"
    if get_origin(hint) is Literal or hint in (Any, inspect.Parameter.empty):
        return "a word"
    return _WORDS.get(get_origin(hint) or hint)
