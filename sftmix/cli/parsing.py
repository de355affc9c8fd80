"""A command line -> its files and its options, which are one more layer of values -> RunConfig."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sftmix.cli.help import help_text
from sftmix.cli.option_lines import OwnOption
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
    print_config  None, or what is printed: "" for all, or skip_default
    help          None, or what --help is asked for; "" without a word after it
    notes         remarks for the user, about options given twice
    """

    configs: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    print_config: str | None = None
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
    if given.print_config is not None:
        if own and not prints:
            raise ConfigError(f"--print_config is an option of `run`, not of `{name}`")
        print_config(parsed.config.plain(), given.print_config)
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


def print_config(plain: Mapping[str, Any], what: str) -> None:
    """Print a plain configuration as YAML that --config takes back, and raise SystemExit(0).

    what  "" or skip_default, which leaves out what has its default
    """
    import yaml

    if what not in ("", "skip_default"):
        raise ConfigError(f"--print_config is {what!r}; allowed: nothing after it, or =skip_default")
    shown = _without(plain, RunConfig().plain()) if what else plain
    print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), end="")
    raise SystemExit(0)


def _without(values: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that differ from the defaults; a component that does is whole."""
    other = {name: value for name, value in values.items() if name not in default or value != default[name]}
    inside = {name for name, value in other.items() if isinstance(value, Mapping) and CLASS not in value}
    return {
        name: _without(value, default.get(name) or {}) if name in inside else value for name, value in other.items()
    }


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
            arguments.print_config = value or ""
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
    """Yield a note for each component that has another class in `after` and lost or kept options by it."""
    for name in (name for name in component_bases() if name in before):
        old, new = before[name], after[name]
        if isinstance(old, list):
            remaining = [spec[CLASS] for spec in new]
            if gone := [_shown(spec) for spec in old if spec[CLASS] not in remaining]:
                yield f"{name}: {by} drops {', '.join(gone)}"
        elif isinstance(old, Mapping) and _class(old) != _class(new):
            chosen, args = _chosen(old), new[ARGS] if isinstance(new, Mapping) else {}
            kept = [option for option, value in chosen.items() if args.get(option) == value]
            dropped = [f"{option}={value}" for option, value in chosen.items() if option not in kept]
            words = [
                f"{verb} {', '.join(options)}" for verb, options in (("dropped", dropped), ("kept", kept)) if options
            ]
            if words:
                yield f"{name}: {by} puts {_class(new)} in place of {_class(old)}; {', '.join(words)}"


def _class(spec: Any) -> str:
    """Return the name of a component's class, or what stands in its place."""
    return spec[CLASS].rpartition(".")[2] if isinstance(spec, Mapping) else "null" if spec is None else str(spec)


def _chosen(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a component that differ from its defaults."""
    options = component_options(import_class(spec[CLASS]))
    return {name: value for name, value in spec[ARGS].items() if value is not None and value != options[name].default}


def _shown(spec: Mapping[str, Any]) -> str:
    return f"{_class(spec)}({', '.join(f'{name}={value}' for name, value in _chosen(spec).items())})"
