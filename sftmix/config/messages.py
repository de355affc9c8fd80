"""Messages about a wrong option: the key, the value, what is allowed, and the nearest name.

Names are looked up before jsonargparse sees them. When jsonargparse refuses a value, its message gives the key, the
value and the class; the type of the option gives the allowed values.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal

from sftmix.common.errors import ConfigError, did_you_mean, nearest, told
from sftmix.components.base import Component
from sftmix.config.classes import why_not
from sftmix.config.schema import (
    alternatives,
    component_bases,
    component_classes,
    component_options,
    import_class,
    is_group,
    known_components,
    option_groups,
    option_hints,
)

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list [a, b]",
    dict: "a mapping {name: value}",
    types.NoneType: "null",
}
_OTHER = "another type"
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
_ALIKE = 0.6
"""Least likeness of two names, in [0, 1], of which one is suggested for the other."""


def unknown_option(key: str, allowed: Iterable[str]) -> str:
    """Return the message for an unknown option; `allowed` holds full keys (`training.epochs`)."""
    allowed = list(allowed)
    group = key.partition(".")[0]
    siblings = [k for k in allowed if k.startswith(f"{group}.")] if "." in key else []
    more = f"--help {group if siblings else 'all'} lists them"
    if 0 < len(siblings) <= _LISTED:
        more = f"there are {', '.join(siblings)}"
    guess = _guess(key, siblings, allowed)
    return told(f"unknown option {key}", did_you_mean(guess) if guess else "", more)


def _guess(key: str, siblings: Sequence[str], allowed: Sequence[str]) -> str:
    """Return the allowed key whose last part is most like that of `key`, or the option of which that is a value.

    The last parts are compared alone, since those before them are alike in all options of a group (`siblings`).
    """
    wanted = key.rpartition(".")[2]
    for option in (*siblings, *allowed):
        if wanted in _choices(option_hints().get(option)):
            return f"{option} {wanted}"
        if wanted in ELSEWHERE.get(option, ()):
            return option

    def likeness(option: str) -> float:
        name = option.rpartition(".")[2]
        return max(_ratio(wanted, name), 0.7 * name.startswith(wanted))

    def rank(option: str) -> tuple[float, float]:
        return likeness(option) + 0.1 * (option in siblings), _ratio(key, option)

    return max((option for option in allowed if likeness(option) >= _ALIKE), key=rank, default="")


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


# ------------------------------------------------------------------------ names, before anything is parsed


def refuse_unknown(values: Mapping[str, Any], own: Collection[str] = (), prefix: str = "") -> None:
    """Raise ConfigError for an unknown option or component class, and for a group that is no mapping.

    values  the options of a file, as nested mappings
    own     options of the command beside those of a run
    prefix  of the group that they are in (`model.`)
    """
    for name, value in values.items():
        key = f"{prefix}{name}"
        plain = key.rstrip("+")
        if plain in component_bases():
            refuse_unknown_class(plain, value)
        elif is_group(key):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key}: {value!r} is not a group of options; write `{name}: {{option: value}}`")
            refuse_unknown(value, own, f"{key}.")
        elif plain not in option_hints() and plain not in own:
            if prefix:
                raise ConfigError(unknown_option(key, option_hints()))
            inner = next(iter(value), None) if isinstance(value, Mapping) else None
            named = key if inner is None else f"{key}.{inner}"
            raise ConfigError(unknown_option(named, [*option_hints(), *option_groups()]))


def refuse_unknown_class(field: str, value: Any) -> None:
    """Raise ConfigError if the class chosen for a field of RunConfig is unknown or of another kind."""
    if isinstance(value, list):
        for one in value:
            refuse_unknown_class(field, one)
        return
    base, hint = component_bases()[field], option_hints()[field]
    if isinstance(value, Mapping):
        _refuse_other_keys(field, value)
    name = value.get("class_path") if isinstance(value, Mapping) else value
    may_be_null = types.NoneType in alternatives(hint)
    if isinstance(value, Mapping) and name in _choices(hint):
        raise ConfigError(f"{field}: {name} has no options; choose a class that has some: {_listed(base)}")
    if name in _choices(hint) or (isinstance(value, Mapping) and name is None):
        return
    if name is None:
        if not may_be_null:
            several = "a list, [] for none, of" if typing.get_origin(hint) is list else "one of"
            raise ConfigError(f"{field} is null; it takes {several} {_listed(base)}")
        return
    reason = why_not(base, str(name), words_beside_classes(hint))
    if reason is not None:
        raise ConfigError(f"{field}: {reason}")


def _refuse_other_keys(key: str, spec: Mapping[str, Any]) -> None:
    """Raise ConfigError for a component that is not {class_path, init_args}, or those inside it."""
    others = [str(name) for name in spec if name not in ("class_path", "init_args")]
    written = spec.get("class_path") or next((name for name in others if name[:1].isupper()), "CLASS")
    if others:
        if "class_path" in spec:
            raise ConfigError(f"{key}: put {', '.join(others)} under init_args: {_form(written, others[0])}")
        raise ConfigError(f"{key}: {dict(spec)!r} names no class_path; write {_form(written, 'option')}")
    for name, value in spec.items():
        if value is None:
            raise ConfigError(f"{key}.{name} is null; leave it out, or write {_form(written, 'option')}")
    inner = spec.get("init_args")
    for name, value in inner.items() if isinstance(inner, Mapping) else ():
        if value == {} and name[:1].isupper():  # `objective: {NTP: {}}` would change nothing
            raise ConfigError(f"{key}: {name} is no option; if it is the class, write {_form(name, 'option')}")
        if isinstance(value, Mapping) and "class_path" in value:
            _refuse_other_keys(f"{key}.{name}", value)


def _form(name: str, option: str) -> str:
    return f"{{class_path: {name}, init_args: {{{option}: value}}}}"


def _listed(base: type[Component]) -> str:
    return f"{', '.join(known_components(base))}, or an import path"


# ------------------------------------------------------------------------ values, which jsonargparse refuses


def explain(message: str, own: Mapping[str, Any] | None = None) -> str:
    """Turn a message of jsonargparse into one for people; one without key and value is put on one line.

    own  the command's own options beside those of a run, with their types
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    found = _refused(keys, message, {**option_hints(), **(own or {})}) if keys else None
    return found or " ".join(message.split())


def _refused(keys: list[str], message: str, hints: Mapping[str, Any]) -> str | None:
    """Return the message for the option under `keys`: the parser's key, then the keys of components inside it."""
    key, classes = ".".join(keys), re.findall(r"Problem with given class_path '([^']+)'", message)
    if unknown := re.search(r"Option '([^']+)' is not accepted", message):
        name, options = classes[-1].rpartition(".")[2], list(component_options(import_class(classes[-1])))
        problem = f"{key}.{unknown[1]}: {name} has no option {unknown[1]!r}"
        return told(problem, nearest(unknown[1], options), f"it takes {', '.join(options) or 'none'}")
    if missing := re.search(r"following arguments are required: (.+)", message):
        needed = ", ".join(f"{key}.{name.strip()}" for name in missing[1].split(","))
        return f"{key}: {classes[-1].rpartition('.')[2]} needs {needed}"
    of_component = 1 < len(keys) <= len(classes) + 1
    hint = _option_of(classes[len(keys) - 2], keys[-1]) if of_component else hints.get(key)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if value is not None:
        return _not_allowed(key, hint, value[1])
    if of_component and _OTHER in map(_word, alternatives(hint)):
        allowed = "int, float, str, bool, list, dict, Literal, a dataclass, or a component"
        return f"{key}: its type is {getattr(hint, '__name__', hint)}, which no option can have; allowed: {allowed}"
    return None


def _option_of(class_path: str, name: str) -> Any:
    """Return the type of an option of a component."""
    return component_options(import_class(class_path))[name].annotation


def _not_allowed(key: str, hint: Any, value: str) -> str:
    """Return the message for a value that no part of the type hint allows."""
    parts = alternatives(hint)
    bases = [found for part in parts if typing.get_origin(part) is not list for found in component_classes(part)]
    if bases:
        listed, near = _listed(bases[0]), nearest(value, known_components(bases[0]))
        if value.startswith(("NestedArg", "{")) and "class_path" not in value:  # `objective.mu.start: 0`
            return f"{key} is no {bases[0].__name__} that has options; choose one first, --{key} CLASS: {listed}"
        if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value) and (reason := why_not(bases[0], value)):
            return f"{key}: {reason}"
        forms = [*(_WORDS[part] for part in parts if part in _WORDS), _a(bases[0].__name__)]
        shown, near = ("null", "") if value == "None" else (repr(value), near)
        return told(f"{key}: {shown} is not {' or '.join(forms)}", near, f"there are {listed}")
    words = [_word(part) for part in parts if typing.get_origin(part) is not Literal]
    listed = ", ".join([*_choices(hint), *words])
    is_no_text = str in parts and value[:1] not in "{["  # a number, or a word that is none to YAML, as `no`
    fault = "is no text to YAML; put it in quotes" if is_no_text else "is not allowed"
    shown = f"{key}: {value!r} {fault}" if value != "None" else f"{key} is null, or has no value"
    example = f"; for example --{key} '{EXAMPLES[key]}'" if key in EXAMPLES else ""
    return told(shown, nearest(value, _choices(hint)), f"allowed: {listed}{example}")


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"


def _choices(hint: Any) -> list[str]:
    """List the words that a type hint allows: `PairSampler | Literal["auto"]` -> auto."""
    literals = [part for part in alternatives(hint) if typing.get_origin(part) is Literal]
    return [str(word) for literal in literals for word in typing.get_args(literal)]


def words_beside_classes(hint: Any) -> list[str]:
    """List the words that a field takes in place of a class: `PairSampler | Literal["auto"] | None` -> auto, null."""
    return [*_choices(hint), *(["null"] if types.NoneType in alternatives(hint) else [])]


def _word(hint: Any) -> str:
    if is_dataclass(hint):
        return "a group {option: value}"
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(typing.get_args(hint))} values"
    return _WORDS.get(typing.get_origin(hint) or hint, _OTHER)
