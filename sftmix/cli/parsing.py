"""A command line -> its files and its options, which are one more layer of values -> RunConfig."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from sftmix.cli.help import OwnOption, help_text
from sftmix.cli.results import say
from sftmix.common.errors import ConfigError
from sftmix.config import RunConfig
from sftmix.config.layers import OF_COMPARE, Layer, config_file, read_layers, refuse_table
from sftmix.config.merge import ARGS, CLASS, Tree, build, merge
from sftmix.config.messages import unknown_option
from sftmix.config.schema import component_bases, component_options, import_class, is_flag, list_options, option_hints


@dataclass
class Arguments:
    """The words of a command line.

    configs       files of --config, in order
    options       the other options with their values, as texts
    callbacks     options of lists of components, in order: each word of a list begins a mapping, as an option without
                  a class (`callbacks.every`) is that of the last one before it
    print_config  True to print the configuration and do nothing else
    help          None, or what --help is asked for; "" without a word after it
    notes         remarks for the user, about options given twice
    """

    configs: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    print_config: bool = False
    help: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Parsed:
    """A configuration with what it was made from: the tree of its options, remarks, and the command's own options."""

    config: RunConfig
    tree: Tree
    notes: list[str]
    own: SimpleNamespace


def configuration(
    name: str, about: str, argv: Sequence[str], own: Sequence[OwnOption] = (), *, prints: bool = False
) -> tuple[RunConfig, SimpleNamespace]:
    """Return the RunConfig of a command line and the command's own options; --help and --print_config end here.

    prints  take --print_config, which prints the configuration without the options in `own`, in spite of these
    """
    given = read_arguments(argv, own)
    if given.help is not None:
        print(help_text(name, f"sftmix {name} [--config FILE] [options]", about, given.help, own), end="")
        raise SystemExit(0)
    parsed = parse(given, own)
    for note in parsed.notes:
        say(f"note: {note}")
    if given.print_config:
        if own and not prints:
            raise ConfigError(f"--print_config is an option of `run`, not of `{name}`")
        print_config(parsed.config.plain())
    return parsed.config, parsed.own


def parse(given: Arguments, own: Sequence[OwnOption] = ()) -> Parsed:
    """Apply the files of a command line in their order, then its options; raise ConfigError for what does not fit."""
    hints = {option.name: option.type for option in own}
    tree: Tree = {}
    notes = list(given.notes)
    layers = [(f"--config {layer.name}", layer) for layer in _layers(given.configs, table=OF_COMPARE in hints)]
    for by, layer in layers:
        before, tree = tree, merge(tree, layer, hints)
        notes += changes(before, tree, by)
    before = tree
    for options in (given.options, *given.callbacks):
        tree = merge(tree, Layer("", options), hints)
    notes += changes(before, tree, "the command line")
    values = SimpleNamespace(**{option.name: tree.get(option.name, option.default) for option in own})
    return Parsed(build(tree), tree, notes, values)


def _layers(configs: Sequence[str], *, table: bool) -> Iterator[Layer]:
    """Yield every layer of the files, in the order in which they apply."""
    applied = set[Path]()
    for config in configs:
        layers = read_layers(config, applied)
        if not table:
            refuse_table(layers)
        yield from layers


def print_config(plain: Mapping[str, Any]) -> NoReturn:
    """Print a plain configuration as YAML that --config takes back, and raise SystemExit(0)."""
    import yaml

    print(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), end="")
    raise SystemExit(0)


# ------------------------------------------------------------------------------------------------ words


def read_arguments(argv: Sequence[str], own: Sequence[OwnOption] = ()) -> Arguments:
    """Read the words of a command line; raise ConfigError for unknown options and for missing values.

    own  the command's options beside those of RunConfig
    """
    arguments, seen = Arguments(), Counter[str]()
    flags = {option.name for option in own if option.type is bool}
    for key, value in _pairs(argv, lambda key: key in flags or is_flag(key)):
        if key == "help":
            arguments.help = value or ""
        elif key == "print_config":
            arguments.print_config = True
        elif key == "config":
            arguments.configs.append(config_file(value or ""))
        else:
            _check_key(key, [option.name for option in own])
            seen[key] += 1
            field = key.partition(".")[0].rstrip("+")
            if field in list_options() and field in component_bases():
                if "." not in key or not arguments.callbacks:
                    arguments.callbacks.append({})
                arguments.callbacks[-1][key] = value
            elif key.endswith("+"):
                arguments.options[key] = [*arguments.options.get(key, []), value]
            else:
                arguments.options[key] = value
    for key in (key for key, times in seen.items() if times > 1 and not key.endswith("+")):
        if key in list_options():
            raise ConfigError(f"--{key} was given more than once; add values with --{key}+ VALUE")
        arguments.notes.append(f"--{key} was given more than once; the last one counts")
    return arguments


def _pairs(argv: Sequence[str], flag: Callable[[str], bool]) -> Iterator[tuple[str, str | None]]:
    """Yield (key, value) of every option; the value is None for a bare --help or --print_config."""
    words, previous = deque(argv), ""
    while words:
        word = words.popleft()
        key, equals, value = word[2:].partition("=")
        if word in ("-h", "--help"):
            yield "help", words.popleft() if words and not words[0].startswith("-") else None
            continue
        if not word.startswith("--") or not key:
            raise ConfigError(_stray(word, previous))
        if equals or key == "print_config":
            yield key, value
        elif flag(key):
            is_value = bool(words) and words[0].lower() in ("true", "false")
            yield key, words.popleft() if is_value else "true"
        elif words and not words[0].startswith("--"):
            yield key, words.popleft()
        else:
            _check_key(key, ("config",))
            raise ConfigError(f"--{key} needs a value")
        previous = key


def _stray(word: str, previous: str) -> str:
    if (key := previous.rstrip("+")) in list_options():
        return f"--{key} takes one value at a time, so {word!r} is too many; add it with --{key}+ {word}"
    after = f" after --{previous}" if previous else ""
    return f"unexpected argument {word!r}{after}; options start with --"


def _check_key(key: str, own: Collection[str]) -> None:
    """Raise ConfigError for an unknown option; the options of a component are checked by its constructor."""
    name = key.rstrip("+")
    if inside := [f"--{k}" for k in option_hints() if k.startswith(f"{name}.")]:
        raise ConfigError(f"--{name} is a group of options, not an option; there are {', '.join(inside)}")
    if name not in (*option_hints(), *own) and name.partition(".")[0] not in component_bases():
        raise ConfigError(unknown_option(name))


# ------------------------------------------------------------------------------------------------ notes


def changes(before: Tree, after: Tree, by: str) -> Iterator[str]:
    """Yield a note for each component that has another class in `after` and lost options by it."""
    for name in (name for name in component_bases() if isinstance(before.get(name), Mapping)):
        old, new = before[name], after[name]
        no_class: dict[str, Any] = {CLASS: "null" if new is None else str(new), ARGS: {}}
        other = new if isinstance(new, Mapping) else no_class
        if other[CLASS] == old[CLASS]:
            continue
        defaults = component_options(import_class(old[CLASS]))
        given = {key: value for key, value in old[ARGS].items() if value not in (None, defaults[key].default)}
        if lost := [f"{key}={value}" for key, value in given.items() if other[ARGS].get(key) != value]:
            names = [spec[CLASS].rpartition(".")[2] for spec in (other, old)]
            yield f"{name}: {by} puts {names[0]} in place of {names[1]}; dropped {', '.join(lost)}"
