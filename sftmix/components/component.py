"""What every component has: its options, what it needs and gives, its files; and checks of options."""

import ast
import importlib.util
import inspect
import linecache
import os
import sys
from abc import ABCMeta
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import _HAS_DEFAULT_FACTORY as FACTORY  # type: ignore[attr-defined]
from dataclasses import asdict, is_dataclass
from enum import StrEnum
from functools import cache
from hashlib import sha256
from types import MethodType
from typing import Any, TypeVar, get_args

from sftmix.words.errors import ConfigError, refuse
from sftmix.words.given import path_text


class Need(StrEnum):
    """What a component may need, and another component, the options or the run give it."""

    CONFIDENCE = "the confidence of each example"
    RESPONSE_ALONE = "the NLL of each response without its instruction"
    CORRECT = "the number of correct tokens"
    BEFORE_TRAINING = "the perplexity before training"
    PAIRS = "pairs of examples"
    FIRST_SPLIT = "pairs or groups in the first epoch"
    BATCH_NLL = "the NLL of the global batch before each step"
    HELD_OUT = "held-out rows"
    EVALUATIONS = "the evaluations of a callback before it"
    STOP = "an end of the training"
    TRAINING = "a training run of its own"
    SCORING = "models that score the examples"
    TARGET_LOSSES = "the losses of the target's own training"
    WHOLE_WEIGHTS = "weights that ranks do not share"
    TOKEN_NLL = "the NLL of each token"
    MIXED_HEAD_INPUTS = "an objective that mixes the inputs of the LM head"
    STATES = "states of the layers, which activation checkpointing computes again"
    ENTROPY = "the entropy of the prediction of each token"
    MARGIN = "the margin of the prediction of each token"
    MEAN_STATES = "the mean state of each response"
    TEXTS = "the texts of the rows"
    PROMPTS = "the tokens of the prompts"
    TEACHER = "a second set of weights"


KEPT = {Need.ENTROPY: "entropy", Need.MARGIN: "margin", Need.MEAN_STATES: "states"}
"""Needs that a reference meets by what it keeps of each response -> their words in `reference.keep`."""
OF_DYNAMICS = {
    Need.RESPONSE_ALONE: "alone_nll_sum",
    Need.TOKEN_NLL: "token_nll",
    Need.ENTROPY: "token_entropy",
    Need.MARGIN: "token_margin",
    Need.MEAN_STATES: "states",
    Need.TEXTS: "texts",
}
"""Needs -> the field of TrainingDynamics, and of Scores if it has that, which is None if nobody needs it."""


_Made = TypeVar("_Made")
_NOT_FOREIGN = {"sftmix", "torch", *sys.stdlib_module_names}


class _Kept(ABCMeta):
    """Keeps the arguments of a component's constructor once that is done: no other moment is after all of __init__."""

    @property
    def __signature__(cls: type[Any]) -> inspect.Signature:
        """The constructor's, where inspect would find the one of __call__."""
        if cls.__init__ is object.__init__:
            return inspect.Signature()
        return inspect.signature(MethodType(cls.__init__, cls))

    def __call__(cls: type[_Made], *args: Any, **kwargs: Any) -> _Made:
        self = super().__call__(*args, **kwargs)  # type: ignore[misc]
        bound = inspect.signature(cls).bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if value is FACTORY:  # of a dataclass: field(default_factory=list)
                bound.arguments[name] = getattr(self, name)
        refuse([*_misused(self)], cls.__name__)
        object.__setattr__(self, "_init_args", bound.arguments)  # a component may be a frozen dataclass
        return self


def _misused(component: Any) -> Iterator[str]:
    """Yield what is wrong with the attributes of a component, beside its values."""
    cls = type(component)
    for name, value in vars(component).items():
        if inspect.isfunction(getattr(cls, name, None)) and not callable(value):
            yield f"{cls.__name__}.{name} is {value!r}, and hides the method {name}(); call it my_{name}"
    for name in ("needs", "gives"):
        if not (isinstance(value := getattr(component, name), Set) and all(isinstance(one, Need) for one in value)):
            yield f"{cls.__name__}.{name} is {value!r}; allowed: a set of members of Need, as frozenset({{Need.TEXTS}})"
    if hasattr(component, "state_dict") and not hasattr(component, "load_state_dict"):
        yield f"{cls.__name__} has state_dict(), and no load_state_dict(state), by which a resumed run gives it back"


class Component(metaclass=_Kept):
    """A part that keeps its constructor's arguments, so that a run can be rebuilt, compared and hashed from them.

    What it needs is checked before anything is trained: a class, or its constructor, says so in `needs`.
    """

    needs: Set[Need] = frozenset()
    """What must be there for it. The base classes say which members count for their kind."""
    gives: Set[Need] = frozenset()
    """What others may have from it; leaving a member out is a promise that it never gives that."""
    package: str | None = None
    """The package that has to be installed for it."""
    option = ""  # that chooses a component of this kind, for messages
    instead = ""  # which option chooses ours, if it is another
    _init_args: Mapping[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse an option once the constructor is done: its arguments are what a run records."""
        if name in self._init_args:  # while __init__ runs this is the class's, which is empty
            option = f"{self.option}.{name}".removeprefix(".")
            raise ConfigError(f"{option} is set by the constructor: make a new {type(self).__name__}({name}=...)")
        super().__setattr__(name, value)

    def files(self) -> Sequence[str]:
        """Return the files and model directories that this component reads; a run refuses a change of their content."""
        return ()

    def __str__(self) -> str:
        return type(self).__name__

    def spec(self) -> dict[str, Any]:
        """Return {"class_path": import path, "init_args": plain values}, the form that config.yaml stores."""
        return {"class_path": import_path(type(self)), "init_args": to_builtin(self._init_args)}


def import_path(cls: type) -> str:
    """Return the import path of a class, by which an option may choose it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def missing_package(component: Component) -> str:
    """Return `needs the package NAME: pip install NAME` if the package of a component is not installed, else ""."""
    if (package := component.package) and importlib.util.find_spec(package) is None:
        return f"needs the package {package}: pip install {package}"
    return ""


def all_parts(options: Any) -> Iterator[Component]:
    """Yield all components in an option's value, with those among their own options."""
    if isinstance(options, Component):
        yield options
        options = options._init_args
    if isinstance(options, Mapping):
        options = [*options.values()]
    for value in options if isinstance(options, (list, tuple)) else ():
        yield from all_parts(value)


def files_of(options: Any) -> list[str]:
    """Return the `files()` of all components in an option's value, with those among their own options."""
    return [os.fspath(name) for part in all_parts(options) for name in part.files()]


def code_of(options: Any) -> dict[str, str]:
    """Return import path -> hash of the source, of all their classes that are neither the package's nor Python's."""
    classes = [cls for part in all_parts(options) for cls in type(part).__mro__]
    # base classes as well: an edit of my_lab.Base changes what my_lab.Mine does
    foreign = [cls for cls in classes if cls.__module__.partition(".")[0] not in _NOT_FOREIGN]
    return {import_path(cls): _source(cls) for cls in foreign}


@cache
def _source(cls: type) -> str:
    """Return the hash of a class's source as it was when first asked for: its file may be edited while it runs.

    A class without any source, as of Python's own prompt, is like itself alone.
    """
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # of type(), of a notebook, whose module has no file, or of a module that is gone
        source = _source_in_notebook(cls) or os.urandom(32).hex()
    return sha256(source.encode()).hexdigest()


def _source_in_notebook(cls: type) -> str | None:
    """Return the source of a class of a notebook, whose cells are known by the code in them alone."""
    for method in filter(inspect.isfunction, vars(cls).values()):
        cell = "".join(linecache.getlines(method.__code__.co_filename))  # <ipython-input-3>: the text of that cell
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                return ast.get_source_segment(cell, node)
    return None


def to_builtin(value: Any) -> Any:
    """Return the value as Python's own types, which JSON holds: components as their spec, dataclasses as mappings."""
    if isinstance(value, Component):
        return value.spec()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): to_builtin(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_builtin(v) for v in value]
    return path_text(value)


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise ConfigError for the value of an option that is not as it must be."""
    if not holds:
        raise ConfigError(f"{key} is {value!r}; allowed: {allowed}")


def require_one_of(key: str, value: str, words: Any) -> None:
    """Raise ConfigError if an option's value is none of the words of a Literal."""
    require(value in get_args(words), key, value, ", ".join(get_args(words)))
