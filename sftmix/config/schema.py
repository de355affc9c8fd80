"""What can be set: the options of groups and of components, and component classes by short name or import path.

The working directory is searched for classes that options name, and for nothing else. Libraries look for optional
packages when they are imported: a directory from elsewhere could hold a file of such a name, and it would run if the
directory were always searched.
"""

import dataclasses
import importlib
import inspect
import sys
import traceback
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sftmix.components.component import FACTORY, Component, import_path
from sftmix.components.listing import catalogue
from sftmix.config.run_config import RunConfig
from sftmix.words.errors import ConfigError, nearest, with_suggestion


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type hint: `list[str] | None` -> list[str], NoneType; `int` -> int."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def group_in(hint: Any) -> type | None:
    """Return the group of options, a dataclass, in a type hint: `LoraOptions | None` -> LoraOptions; or None."""
    return next((kind for kind in alternatives(hint) if dataclasses.is_dataclass(kind)), None)  # type: ignore[return-value]


def component_in(hint: Any) -> type[Component] | None:
    """Return the base class of the component in a type hint: `PairSampler | None` -> PairSampler; or None.

    The base class of a list of components counts as well.
    """
    kinds = [inner for kind in alternatives(hint) for inner in (kind, *typing.get_args(kind))]
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, Component)), None)


def is_list(hint: Any) -> bool:
    """Return True for options that take several values: `--data.train a --data.train+ b`."""
    return any(typing.get_origin(kind) is list for kind in alternatives(hint))


@cache
def options_of(owner: Any) -> dict[str, inspect.Parameter]:
    """Return the options of a group or of a component class: its constructor's parameters, with their types resolved.

    A parameter without a type has the type Any. Raises ConfigError if a type cannot be resolved, or a
    parameter has no name of its own.
    """
    named, parameters = f"{import_path(owner)}.__init__", inspect.signature(owner).parameters
    try:
        hints = typing.get_type_hints(owner.__init__)  # with `from __future__ import annotations` they are texts
    except (NameError, AttributeError, TypeError) as error:
        raise ConfigError(f"the types in {named} cannot be read, and they are its options: {error}") from error
    for parameter in parameters.values():
        if parameter.kind not in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            raise ConfigError(f"{named} takes {parameter}, and its parameters are its options: name each option")
    fields = getattr(owner, "__dataclass_fields__", {})
    return {
        p.name: p.replace(
            annotation=hints.get(p.name, typing.Any),
            # of a group, or of a component that is a dataclass: field(default_factory=list)
            default=fields[p.name].default_factory() if p.default is FACTORY else p.default,
        )
        for p in parameters.values()
    }


@cache
def option_hints(group: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Return full key -> type of every option outside components, in the order of the tree."""
    hints: dict[str, Any] = {}
    for name, option in options_of(group).items():
        inner = group_in(option.annotation)
        hints |= option_hints(inner, f"{prefix}{name}.") if inner else {f"{prefix}{name}": option.annotation}
    return hints


@cache
def component_bases() -> dict[str, type[Component]]:
    """Return the name of each option that holds components -> their base class."""
    return {name: base for name, o in options_of(RunConfig).items() if (base := component_in(o.annotation))}


# ------------------------------------------------------------------------------------- component classes


class ForeignClassError(ConfigError):
    """A class that is not of this package, named where names are not trusted: in the run of someone else."""


_OURS = ("sftmix.text.", "sftmix.tools.trackers.")
"""Where this package has components that no list shows; to import these modules runs nothing."""
_trusted: list[Collection[str] | None] = []
"""Import paths beside those of this package's components; no entry, or a None: every class may be imported."""


@contextmanager
def trusting(paths: Collection[str] | None = ()) -> Iterator[None]:
    """Import this package's components alone, and classes at these import paths; ForeignClassError for any other.

    None: import any class, also where what is called trusts fewer.
    """
    _trusted.append(paths)
    try:
        yield
    finally:
        _trusted.pop()


def trusts_all() -> bool:
    """Return True within `trusting(None)`."""
    return None in _trusted


def import_class(path: str) -> type:
    """Import the class at an import path; in `trusting`, ForeignClassError for one that is not trusted.

    If Python does not find its module, the working directory is searched as well, and stays at the end of sys.path: a
    module may import others beside it when it runs.
    """
    trusted = _trusted[-1] if _trusted and not trusts_all() else None  # --trust holds for all that is called
    shipped = (one.path for _, kind in catalogue() for one in kind)
    if trusted is not None and not path.startswith(_OURS) and path not in {*trusted, *shipped}:
        raise ForeignClassError(
            f"{path} is no component of this package: its module would be imported, and its code would run. If you "
            "know it, name the class on the command line, or add --trust"
        )
    return _imported(path)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    package, here = module.partition(".")[0], str(Path.cwd().resolve())
    if package not in sys.modules and find_spec(package) is None and PathFinder.find_spec(package, [here]):
        sys.path.append(here)  # at the end, so that no file there hides an installed module
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module or "." not in module:
            raise  # my_lab is not there, or is there and imports what is not
        owner = _imported(module)  # my_lab.Outer of my_lab.Outer.Inner: a class inside a class
    return getattr(owner, name)


def chosen_by(cls: type) -> str:
    """Return the name by which an option finds a class in a process that has not imported it."""
    shipped = cls.__module__.startswith("sftmix.components.")
    return cls.__name__ if shipped else import_path(cls)


def imported_classes(base: type[Component]) -> list[type[Component]]:
    """Return every imported subclass of a base class, those of its subclasses behind them."""
    classes = base.__subclasses__()
    for cls in classes:
        classes += cls.__subclasses__()
    return classes


def known_components(base: type[Component]) -> dict[str, type[Component]]:
    """Return name -> class for every imported concrete subclass of a base class, shipped ones first.

    The name is one that an option takes: the short name of a shipped class, the import path of any other.
    """
    catalogue()  # which imports the shipped ones
    known: dict[str, type[Component]] = {}
    for cls in imported_classes(base):
        # ScoreAtCheckpoints in sftmix.training, which no option takes
        internal = cls.__module__.startswith("sftmix.") and chosen_by(cls) != cls.__name__
        if not (internal or inspect.isabstract(cls) or cls.__name__.startswith("_")):
            known[chosen_by(cls)] = cls  # the last one of a notebook that has made a class again
    return known


def listed_components(base: type[Component], words: Sequence[str] = ()) -> str:
    """List the components of a kind for a message; `words` are what an option takes beside them."""
    own = f"the import path of your own class (my_module.MyClass){base.instead}"
    names = ", ".join([*known_components(base), *words])
    return f"{names}, or {own}" if names else own


def find_component(base: type[Component], name: str, key: str = "", words: Sequence[str] = ()) -> type[Component]:
    """Return the class of a kind that a name chooses; raise ConfigError that says why it chooses none.

    key    the option, for messages
    words  what the option takes beside components
    """
    where, reason = f"{key}: " if key else "", ""
    cls = known_components(base).get(name)
    if "." in name and (cls is None or _trusted):  # one that is imported already may still not be trusted
        try:
            cls = import_class(name)
        except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
            reason = f": {error}{_hidden(name.partition('.')[0])}"
    if cls is None:
        near = [*known_components(base), *words]  # with the components of a module that was imported just now
        guess = nearest(name, near) or nearest(name.rpartition(".")[2], near)  # sftmix.components.Medin -> Median
        problem = f"{where}no {base.__name__} {name!r}{reason}"
        raise ConfigError(with_suggestion(problem, guess, f"there are {listed_components(base, words)}"))
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise ConfigError(f"{where}{name} is no subclass of sftmix.components.{base.__name__}")
    if inspect.isabstract(cls):
        methods = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        raise ConfigError(f"{where}{name} is abstract: it lacks {methods}, which a subclass of its kind defines")
    return cls


def _hidden(package: str) -> str:
    """Return that Python has found a module elsewhere than in the working directory, which has one as well; else ""."""
    here = PathFinder.find_spec(package, [str(Path.cwd().resolve())])
    taken = getattr(sys.modules.get(package), "__file__", None)
    if here is None or taken in (None, here.origin):
        return ""
    return f" ({here.origin} is not looked at: Python has a module of that name, {taken}; rename yours)"


def name_component(error: Exception) -> None:
    """Add a note to an error that a user's own component raised: which one, and what is kept."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        own = type(frame.f_locals.get("self"))
        if issubclass(own, Component) and not own.__module__.startswith("sftmix."):
            error.add_note(
                f"{own.option} {own.__name__} raised this; what is done before it is kept: mend it, and give the same "
                "command. A stage with checkpoints refuses the mended class: move its directory away first"
            )
            return
