"""What components keep of a stage's past: a checkpoint holds it, and it comes back equal.

Callbacks that may stop a training keep attributes; an objective or a perturbation keeps what its `state_dict` returns.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sftmix.components.base import Callback
from sftmix.components.component import Component, Need
from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError


class CallbackState:
    """The attributes that callbacks which may stop have changed since the stage began, but those named _NAME.

    parts  other components, of which those with `state_dict` and `load_state_dict` are kept
    """

    def __init__(self, callbacks: Sequence[Callback], world: World, parts: Sequence[Component | None] = ()) -> None:
        deciding = [one for one in callbacks if Need.STOP in one.gives]
        self.world = world
        self.built = [(one, {key: repr(value) for key, value in vars(one).items()}) for one in deciding]
        self.parts: list[Any] = [part for part in parts if hasattr(part, "state_dict")]

    def out(self) -> list[list[dict[str, Any]]]:
        """Return them for each rank and component; ConfigError for the first that JSON would not bring back equal."""
        found = []
        for one, built in self.built:
            changed = {
                key: value for key, value in vars(one).items() if repr(value) != built.get(key) and key[0] != "_"
            }
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


def _refuse_lost(named: str, values: Mapping[str, Any], remedy: str) -> None:
    """Raise ConfigError for the first value that JSON would not bring back equal."""
    for key, value in json.loads(json.dumps(values, default=repr, skipkeys=True)).items():
        if repr(value) != repr(values[key]):  # as text: NaN is not equal to itself
            raise ConfigError(
                f"{named}{key}, so a resumed run would be another one. It may keep numbers, texts, lists, and mappings "
                f"from texts{remedy}"
            )
