"""What components keep of a stage's past: a checkpoint holds it, and it comes back equal.

Callbacks that may stop a training keep attributes; an objective or a perturbation keeps what its `state_dict` returns,
and so does a component among their options.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from sftmix.components.base import Callback
from sftmix.components.component import Component, Need, all_parts
from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError


def stopping(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return the callbacks that may stop a training."""
    return [one for one in callbacks if Need.STOP in one.gives]


def stateful(*parts: Component | None) -> list[Any]:
    """Return those of some components, and of the components among their options, that have `state_dict`."""
    return [one for part in parts for one in all_parts(part) if hasattr(one, "state_dict")]


@contextmanager
def unmoved(*parts: Component | None) -> Iterator[None]:
    """Give components their state back at the end: what is only measured moves no training."""
    kept = [(one, copy.deepcopy(one.state_dict())) for one in stateful(*parts)]
    try:
        yield
    finally:
        for one, state in kept:
            one.load_state_dict(state)


@contextmanager
def refusing_moves(objective: Component) -> Iterator[None]:
    """Raise ConfigError at the end if the objective has changed its state."""
    parts = stateful(objective)
    before = [repr(one.state_dict()) for one in parts]
    yield
    if before != [repr(one.state_dict()) for one in parts]:
        raise ConfigError(
            f"objective {objective}: plan() changes its state. The plan of a step is made before the checkpoint of the "
            "step before it, so a resumed run would be another one: change the state in loss()"
        )


class AsBuilt:
    """The attributes that callbacks which may stop have at first, but those named _NAME.

    Each stage begins with them: the callbacks of a resumed run have not seen the stages before.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._of_each = [(one, _copied(_public(one))) for one in stopping(callbacks)]

    def put(self) -> None:
        """Give them these attributes, and no other ones."""
        for one, built in self._of_each:
            for key in _public(one).keys() - built.keys():
                delattr(one, key)
            vars(one).update(_copied(built))


def _public(one: Callback) -> dict[str, Any]:
    return {key: value for key, value in vars(one).items() if key[0] != "_"}


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes with copies of lists and mappings; another value that changes is refused by CallbackState."""
    return {key: copy.deepcopy(value) if isinstance(value, (list, dict)) else value for key, value in values.items()}


class CallbackState:
    """The attributes that callbacks which may stop have changed since the stage began, but those named _NAME.

    parts  other components, whose state is kept as of `stateful`
    """

    def __init__(self, callbacks: Sequence[Callback], world: World, parts: Sequence[Component | None] = ()) -> None:
        self.world = world
        self.built = [
            (one, {key: repr(_content(value)) for key, value in vars(one).items()}) for one in stopping(callbacks)
        ]
        self.parts = stateful(*parts)

    def out(self) -> list[list[dict[str, Any]]]:
        """Return them for each rank and component; ConfigError for the first that JSON would not bring back equal."""
        found = []
        for one, built in self.built:
            changed = {key: value for key, value in _public(one).items() if repr(_content(value)) != built.get(key)}
            _refuse_lost(
                f"callbacks: no checkpoint would bring back {type(one).__name__}.",
                changed,
                "; if it never stops the training, let it say so (gives = frozenset())",
            )
            found.append(changed)
        for part in self.parts:
            kept = dict(part.state_dict())
            _refuse_lost(f"{part.option}: no checkpoint would bring back state_dict() of {part}, key ", kept, "")
            found.append(kept)
        return self.world.gather(found)

    def put(self, of_ranks: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Give the components of this rank what `out` has returned, at any number of ranks."""
        of_rank = of_ranks[self.world.rank % len(of_ranks)]
        for (one, _), kept in zip(self.built, of_rank, strict=False):
            vars(one).update(kept)
        for part, kept in zip(self.parts, of_rank[len(self.built) :], strict=False):
            part.load_state_dict(kept)


def _content(value: Any, levels: int = 4) -> Any:
    """Return a form of a value that differs after a change in place; the `repr` of an object or a long array may not.

    levels  of objects and collections that are looked into
    """
    if hasattr(value, "tolist"):  # an array, a tensor
        return value.tolist()
    inside: Any = value if isinstance(value, (Mapping, list, tuple)) else getattr(value, "__dict__", None)
    if not levels or isinstance(value, (type, ModuleType)) or inside is None:
        return repr(value)
    fields = inside if isinstance(inside, Mapping) else dict(enumerate(inside))
    return [repr(value), {key: _content(one, levels - 1) for key, one in fields.items()}]


def _refuse_lost(named: str, values: Mapping[str, Any], remedy: str) -> None:
    """Raise ConfigError for the first value that JSON would not bring back equal."""
    for key, value in json.loads(json.dumps(values, default=repr, skipkeys=True)).items():
        if repr(value) != repr(values[key]):  # as text: NaN is not equal to itself
            raise ConfigError(
                f"{named}{key}, so a resumed run would be another one. It may keep numbers, texts, lists, and mappings "
                f"from texts{remedy}"
            )
