"""How options and components are chosen: layers of plain values -> one plain tree -> RunConfig.

A file, a recipe, a command line and a variant of a table are layers: mappings from the full key of an option
(`objective.mu: 0.4`) or in braces (`objective: {mu: 0.4}`). Their order says nothing: keys with fewer dots apply first.
`merge` lays layers over each other, and checks each value against the type of its option. `build` makes the RunConfig
of the result.

In the plain tree a component is {"class_path": import path, "init_args": the options that were given}.
"""

from collections.abc import Mapping
from inspect import Parameter
from types import NoneType
from typing import Any

from sftmix.components.component import Component, import_path
from sftmix.config.run_config import RunConfig
from sftmix.config.schema import (
    alternatives,
    component_in,
    find_component,
    group_in,
    import_class,
    is_list,
    listed_components,
    options_of,
)
from sftmix.config.values import (
    NoValueError,
    converted,
    from_yaml,
    no_option_of,
    not_allowed,
    unknown_option,
    words_of,
)
from sftmix.options.training import TrainingOptions
from sftmix.words.errors import ConfigError
from sftmix.words.given import as_list

CLASS, ARGS = "class_path", "init_args"

Tree = dict[str, Any]
"""The options that were given, nested, as plain values of their types."""


def merge(tree: Tree, values: Mapping[str, Any], more: Mapping[str, Any] | None = None, *, of: str = "") -> Tree:
    """Return the tree with one more layer of values over it; raise ConfigError for what does not fit.

    more  name -> parameter of each option that a command has besides a run's
    of    the name of the file, for messages
    """
    try:
        known = {**options_of(RunConfig), **(more or {})}
        # of this layer alone: max_steps of a file and --training.epochs may both be set
        of_training = {key: value for key, value in values.items() if key.startswith("training")}
        _refuse_both(_merge_options({}, of_training, known, "").get("training", {}))
        return _merge_options(tree, values, known, "")
    except ConfigError as error:
        raise type(error)(f"{of}: {error}" if of else str(error)) from error


def build(tree: Tree) -> RunConfig:
    """Make the configuration that a tree describes; options that it does not name have their defaults."""
    return _make(tree, RunConfig, "")


# ------------------------------------------------------------------------------------------------ merging


def _refuse_both(given: Tree) -> None:
    """Raise ConfigError if one layer says in two ways when a training ends, unless it has most options of the group.

    No person wrote that, but a run, of whichever release, or --print_config: they write all options, and so `max_steps`
    beside the default of `epochs`.

    given  the options of `training` in the layer
    """
    epochs, steps = given.get("epochs"), given.get("max_steps")
    if None not in (epochs, steps) and 2 * len(given) < len(options_of(TrainingOptions)):
        raise ConfigError(
            f"training.epochs {epochs} and training.max_steps {steps} exclude each other: a run ends after its epochs "
            "or after its steps; leave one out"
        )


def _order(item: tuple[str, Any]) -> tuple[int, bool]:
    """Sort the keys of a layer: an option before those inside it, a list before what is added to it."""
    key = item[0].removesuffix(f".{CLASS}")  # objective.class_path before objective.mu, as objective is
    return key.count("."), key.endswith("+")


def _merge_options(
    old: Tree,
    new: Mapping[str, Any],
    known: Mapping[str, Parameter],
    prefix: str,
    cls: type[Component] | None = None,
) -> Tree:
    """Lay the options of a layer over the old ones of a group, or of a component of class `cls`.

    new  values by the names of options, or by `name+` for what is added to a list
    """
    tree = dict(old)
    for key, given in sorted(new.items(), key=_order):
        first, _, rest = key.partition(".")  # objective.mu.start -> objective, mu.start; data.train+ -> data, train+
        name, full = first.removesuffix("+"), f"{prefix}{first.removesuffix('+')}"
        if name not in known:
            raise no_option_of(cls, full) if cls else unknown_option(f"{prefix}{key}")
        hint = known[name].annotation
        if name != first and not is_list(hint):
            raise ConfigError(f"{full}+: {full} takes one value, and only lists, such as data.train, can be added to")
        before = tree.get(name, _plain_default(known[name].default))  # --callbacks.every 5 changes the default one
        value = {rest: given} if rest else given
        if (base := component_in(hint)) and _lists(hint, value):
            tree[name] = _merge_components(before, value, base, full, added=name != first)
        elif base:
            tree[name] = _merge_component(before, value, hint, base, full)
        # --model '{path: gpt2}'; else null, as of reference.model, or refused
        elif (group := group_in(hint)) and isinstance(spelled := from_yaml(value), Mapping):
            options = before if isinstance(before, dict) else {}
            tree[name] = _merge_options(options, spelled, options_of(group), f"{full}.")
        elif rest and isinstance(before, dict):  # one entry of a mapping: data.columns.response
            tree[name] = _convert(before | value, hint, full)
        else:
            tree[name] = _convert(value, hint, full)
            if name != first:  # data.train+: b -> [a, b]
                tree[name] = [*as_list([] if before is None else before), *as_list(tree[name])]
    return tree


def _plain_default(value: Any) -> Any:
    """Return a default as the tree holds it: for a component only the class, as its options also have defaults."""
    if isinstance(value, Component):
        return {**value.spec(), ARGS: {}}
    if value is Parameter.empty:
        return None
    return [_plain_default(item) for item in value] if isinstance(value, list) else value


def _convert(value: Any, hint: Any, key: str) -> Any:
    try:
        return converted(value, hint)
    except NoValueError as error:
        raise not_allowed(key, hint, error.args[0]) from error


def _lists(hint: Any, value: Any) -> bool:
    """Return True for a value of a list: also for null, unless the option has null beside [] (`list[X] | None`)."""
    return is_list(hint) and (from_yaml(value) is not None or NoneType not in alternatives(hint))


def _merge_components(old: list[Any], new: Any, base: type[Component], key: str, *, added: bool) -> list[Any]:
    """Lay new components over those of a list. Options without a class (`callbacks.every`) are for the last one."""
    spelled = from_yaml(new)  # --callbacks '[Evaluate, EarlyStopping]'
    if isinstance(spelled, Mapping) and CLASS not in spelled:
        last = old[-1] if old else None  # {every: 3}, of callbacks.every
        return [*old[:-1], _merge_component(last, spelled, base, base, key)]
    listed = [] if spelled is None else as_list(spelled)  # null: none of them
    components = [_merge_component(None, item, base, base, key) for item in listed]
    return [*old, *components] if added else components


def _merge_component(old: Any, new: Any, hint: Any, base: type[Component], key: str) -> Any:
    """Lay new options over a component; return its class and options, or a plain value that the option takes instead.

    Options without a class are for the class chosen so far. If the class changes, old options stay if it also has them.
    """
    spelled = from_yaml(new)  # --objective '{class_path: SFTMix, mu: 0.1}'
    options = dict(spelled) if isinstance(spelled, Mapping) else {CLASS: new}
    if isinstance(options.get(ARGS), Mapping):  # {class_path: SFTMix, init_args: {mu: 0.1}} and the one above are one
        options |= options.pop(ARGS)
    cls = import_class(old[CLASS]) if isinstance(old, Mapping) else None
    if CLASS in options:
        chosen = _chosen(options.pop(CLASS), hint, base, key)
        if not (isinstance(chosen, type) or options):
            return chosen  # such as null
        cls = chosen if isinstance(chosen, type) else None
    if cls is None:
        raise ConfigError(
            f"{key} is no {base.__name__} that has options; choose one first, --{key} CLASS: {listed_components(base)}"
        )
    known = options_of(cls)
    # mu 0.4 of SFTMix stays if --objective CutMix follows, and is dropped by --objective NTP
    args = {name: value for name, value in old[ARGS].items() if name in known} if isinstance(old, Mapping) else {}
    # objective.init_args.mu: 0.1, with dots
    given = {str(name).removeprefix(f"{ARGS}."): value for name, value in options.items()}
    return {CLASS: import_path(cls), ARGS: _merge_options(args, given, known, f"{key}.", cls)}


def _chosen(name: Any, hint: Any, base: type[Component], key: str) -> Any:
    """Return the class of a name, or the plain value that the option takes instead."""
    try:
        return converted(name, hint)  # auto of pairing, 0.3 of objective.mu
    except NoValueError as error:
        if not isinstance(name, str):
            raise not_allowed(key, hint, name) from error
    return find_component(base, name, key, words_of(hint))


# ------------------------------------------------------------------------------------------------ building


def _make(value: Any, hint: Any, key: str) -> Any:
    """Make the configuration, a group or a component from plain options; any other value stays as it is."""
    if isinstance(value, list) and component_in(hint):
        return [_make(item, hint, key) for item in value]
    group = group_in(hint)
    if not isinstance(value, Mapping) or not (group or component_in(hint)):
        return value
    cls, options = (group, value) if group else (import_class(value[CLASS]), value[ARGS])
    known, prefix = options_of(cls), f"{key}." if key else ""
    if missing := [f"{prefix}{p.name}" for p in known.values() if p.default is p.empty and p.name not in options]:
        raise ConfigError(f"{key}: {cls.__name__} needs {', '.join(missing)}")
    arguments = {  # without the options of a command, which are in the tree beside a run's
        name: _make(inner, known[name].annotation, f"{prefix}{name}")
        for name, inner in options.items()
        if name in known
    }
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"{key}: {cls.__name__} refused its options: {error}") from error
