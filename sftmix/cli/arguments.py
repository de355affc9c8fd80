"""The words of a command line, in an order in which no word undoes another.

Files come first, then the classes of components, then everything else. jsonargparse applies options in the order given:
a file after `--objective NTP` would win over it, and a class after `--objective.mu 0.1` would drop that option.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.config.layers import config_file
from sftmix.config.messages import refuse_unknown_class, unknown_option
from sftmix.config.schema import component_bases, is_flag, list_options, option_hints, single_as_list


@dataclass(frozen=True, eq=False)  # a key of caches, whatever its default is
class OwnOption:
    """An option of one command, beside the options of RunConfig. An option of type bool is a flag."""

    name: str
    type: Any
    default: Any
    metavar: str
    doc: str


@dataclass
class Arguments:
    """A command line, sorted.

    configs       files of --config, in order
    options       the other options as `--key=value`, classes first
    print_config  None, or the flags of --print_config
    help          None, or what --help is asked for; "" without a word after it
    notes         remarks for the user, about options given twice
    """

    configs: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    print_config: str | None = None
    help: str | None = None
    notes: list[str] = field(default_factory=list)


def sort_arguments(argv: Sequence[str], own: Collection[str] = (), flags: Collection[str] = ()) -> Arguments:
    """Sort the words of a command line; raise ConfigError for an unknown option or class, and for a missing value.

    own    names of the command's options beside those of RunConfig
    flags  names of those options that are true or false
    """
    found = Arguments()
    given, seen = list[tuple[str, str | None]](), Counter[str]()
    for key, value in _pairs(argv, lambda key: key in flags or is_flag(key)):
        if key == "help":
            found.help = value or ""
        elif key == "print_config":
            found.print_config = value or ""
        elif key == "config":
            found.configs.append(config_file(value or ""))
        else:
            if key not in own:
                _check_key(key)
            if key.rstrip("+") in component_bases():
                chosen = _plain(value or "")
                refuse_unknown_class(key.rstrip("+"), chosen)
                value = value if single_as_list({key: chosen})[key] is chosen else f"[{value}]"
            seen[key] += 1
            given.append((key, value))
    given.sort(key=lambda option: _rank(option[0], seen))
    found.options = [f"--{key}={value}" for key, value in given]
    for key in (key for key, times in seen.items() if times > 1 and not key.endswith("+")):
        if key in list_options():
            raise ConfigError(f"--{key} was given more than once; add values with --{key}+ VALUE")
        found.notes.append(f"--{key} was given more than once; the last one counts")
    return found


def _pairs(argv: Sequence[str], flag: Callable[[str], bool]) -> list[tuple[str, str | None]]:
    """Return (key, value) of every option; the value is None for a bare --help or --print_config."""
    words, found = deque(argv), list[tuple[str, str | None]]()
    while words:
        word = words.popleft()
        key, equals, value = word[2:].partition("=")
        if word in ("-h", "--help"):
            found.append(("help", words.popleft() if words and not words[0].startswith("-") else None))
        elif not word.startswith("--") or not key:
            raise ConfigError(_stray(word, found[-1][0] if found else None))
        elif equals or key == "print_config":
            found.append((key, value or None if key == "print_config" else value))
        elif flag(key):
            is_value = bool(words) and words[0].lower() in ("true", "false")
            found.append((key, words.popleft() if is_value else "true"))
        elif words and not words[0].startswith("--"):
            found.append((key, words.popleft()))
        else:
            if key != "config":
                _check_key(key)
            raise ConfigError(f"--{key} needs a value")
    return found


def _plain(word: str) -> Any:
    """Return the value of a word as YAML: text, null, a list or a mapping."""
    import yaml

    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _stray(word: str, previous: str | None) -> str:
    if previous and previous.rstrip("+") in list_options():
        key = previous.rstrip("+")
        return f"--{key} takes one value at a time, so {word!r} is too many; add it with --{key}+ {word}"
    after = f" after --{previous}" if previous else ""
    return f"unexpected argument {word!r}{after}; options start with --"


def _rank(key: str, keys: Iterable[str]) -> int:
    """Return the place in the order: classes, classes within their options (`--objective.mu Linear`), the rest."""
    if key in component_bases() and key not in list_options():
        return 0
    return 1 if any(other.startswith(f"{key}.") for other in keys) and "." in key else 2


def _check_key(key: str) -> None:
    """Raise ConfigError for an unknown option; the options of a component are checked by its constructor."""
    name = key.rstrip("+")
    if inside := [k for k in option_hints() if k.startswith(f"{name}.")]:
        keys = ", ".join(f"--{k}" for k in inside)
        raise ConfigError(f"--{name} is a group of options, not an option; there are {keys}")
    if key != name and name not in list_options():
        raise ConfigError(f"--{key}: {name} takes one value; only {', '.join(sorted(list_options()))} can be added to")
    if name not in option_hints() and not ("." in name and name.partition(".")[0] in component_bases()):
        raise ConfigError(unknown_option(name, [*option_hints(), "config", "print_config"]))
