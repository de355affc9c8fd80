"""A command line -> its files and its options, which are one more layer of values -> RunConfig."""

import os
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftmix.cli.help import NoOptions, help_text
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.config.merge import Tree, build, merge
from sftmix.config.read import OF_COMPARE, config_file, read_layers
from sftmix.config.schema import is_list, option_hints, options_of, trusting
from sftmix.config.values import Word
from sftmix.disk.places import Origin, started
from sftmix.pipeline.signature import is_of_stranger, names_given
from sftmix.words.errors import ConfigError


@dataclass
class Arguments:
    """The words of a command line.

    configs       files of --config, in order
    options       the other options with their values, as texts; true for one without a value
    callbacks     options of lists of components, one by one: an option without a class (`callbacks.every`) belongs
                  to the last one before it
    print_config  whether the configuration is only printed
    trust         whether classes that the files of runs name are imported
    help          None, or what --help is asked for; "" without a word after it
    """

    configs: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    print_config: bool = False
    trust: bool = False
    help: str | None = None


def configuration(
    name: str, about: str, argv: Sequence[str], owner: type = NoOptions, *, needs_out: bool = True
) -> tuple[RunConfig, Any]:
    """Return the RunConfig of a command line, validated, and the command's own options, of the dataclass `owner`.

    --help and --print_config end here; the latter also prints a configuration that is not complete.
    """
    arguments = read_arguments(argv, owner)
    if arguments.help is not None:
        print(help_text(name, about, arguments.help, owner), end="")
        raise SystemExit
    config, _, values = parse(arguments, owner)
    if arguments.print_config:
        print_config(config.as_dict())
    validate(config, needs_out=needs_out)
    return config, values


def parse(arguments: Arguments, owner: type = NoOptions) -> tuple[RunConfig, Tree, Any]:
    """Apply the files of a command line in their order, then its options; raise ConfigError for what does not fit.

    Returns the configuration, the tree that it was made from, and the command's own options, of the dataclass `owner`.
    """
    known = options_of(owner)
    tree: Tree = {}
    applied = set[Path]()
    own = (arguments.options, *arguments.callbacks)
    given = [value for words in own for value in words.values()]
    # a class that is named here, as --splitter my_lab.Mine, may be in a config.yaml as well
    trust = None if arguments.trust else {*map(str, given)}
    strangers = [] if arguments.trust else [file for file in arguments.configs if is_of_stranger(Path(file))]
    for file in strangers:  # until this command ends
        started.set(Origin(given=names_given(given), within=Path(file).resolve().parent))
    for file in arguments.configs:
        before = tree
        with trusting(trust) if Path(file).name == "config.yaml" else nullcontext():
            for layer, values in read_layers(file, applied, one_run=OF_COMPARE not in known):
                tree = merge(tree, values, known, of=layer)
        if file in strangers:  # nothing is written where it says
            tree = merge(tree, {"out": before.get("out"), "data.cache_dir": None})
    for words in own:
        tree = merge(tree, words, known)
    options = owner(**{name: tree[name] for name in known if name in tree})
    config = build(tree)
    config.out = config.out and os.path.expanduser(config.out)  # --out=~/runs/first: the shell replaces no ~ there
    return config, tree, options


def print_config(values: Mapping[str, Any]) -> None:
    """Print a configuration as YAML that --config takes back, and raise SystemExit."""
    import yaml

    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    raise SystemExit


# ------------------------------------------------------------------------------------------------ words

_FLAGS = ("print_config", "trust")
"""Options that no value follows."""


def read_arguments(argv: Sequence[str], owner: type = NoOptions) -> Arguments:
    """Read the words of a command line; an option without a value has the value true. ConfigError for stray words.

    owner  dataclass of the command's own options, besides RunConfig's
    """
    arguments = Arguments()
    words = deque(argv)
    seen = [""]
    hints = {**option_hints(), **{name: option.annotation for name, option in options_of(owner).items()}}
    while words:
        word = words.popleft()
        name, equals, value = ("--help" if word == "-h" else word).partition("=")
        key = name.removeprefix("--")
        if key in ("", name):  # "--"; or no option, as "-x" and "3"
            raise _unexpected(word, seen[-1].rstrip("+"), hints)
        argument = _value(key, equals + value, words)
        if key in ("help", *_FLAGS):
            setattr(arguments, key, "" if key == "help" and argument is True else argument)
        elif key == "config":
            arguments.configs.append(config_file(str(argument)))
        elif key in seen and is_list(hints.get(key)):  # the last --seed wins, but of two lists both may be meant
            raise ConfigError(f"--{key} was given more than once; add values with --{key}+ VALUE")
        elif key.partition(".")[0].rstrip("+") == "callbacks":  # the one list of components
            arguments.callbacks.append({key: argument})
        elif key.endswith("+"):  # --data.train+ a --data.train+ b -> {data.train+: [a, b]}
            arguments.options.setdefault(key, []).append(argument)
        else:
            arguments.options[key] = argument
        seen.append(key)
    return arguments


def _value(key: str, behind: str, words: deque[str]) -> Any:
    """Return the value of an option: what is behind its `=`, the next word, or true; ConfigError if it must be another.

    words  the words behind it, of which this takes one
    """
    if key in _FLAGS:
        if behind:
            raise ConfigError(f"--{key}{behind}: this option takes no value; write --{key}, or leave it out")
        return True
    if behind:
        return Word(behind[1:])  # --seed=3
    if words and not words[0].startswith("--"):  # -0.1 is a value
        return Word(words.popleft())
    if key == "config" or key.endswith("+"):  # true would be a file, a label, ... of that name
        raise ConfigError(f"--{key} needs a value behind it")
    return True  # --with_baseline


def _unexpected(word: str, last: str, hints: Mapping[str, Any]) -> ConfigError:
    """Return the error for a word that is no option and no value of the last one."""
    place = f" after --{last}" if last else ""
    more = f"add it with --{last}+ {word}" if is_list(hints.get(last)) else "options start with --"
    return ConfigError(f"unexpected argument {word!r}{place}; {more}")
