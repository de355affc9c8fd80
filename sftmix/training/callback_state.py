"""What callbacks that may stop a training keep of its past: a checkpoint holds it, and it comes back equal."""

import json
from collections.abc import Sequence
from typing import Any

from sftmix.components.base import Callback
from sftmix.components.component import Need
from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError


class CallbackState:
    """The attributes that callbacks which may stop have changed since the stage began, but those named _NAME."""

    def __init__(self, callbacks: Sequence[Callback], world: World) -> None:
        self.world = world
        self.callbacks = [one for one in callbacks if Need.STOP in one.gives]
        self.built = [{key: repr(value) for key, value in vars(one).items()} for one in self.callbacks]

    def out(self) -> list[list[dict[str, Any]]]:
        """Return them for each rank and callback; ConfigError for the first that JSON would not bring back equal."""
        found = []
        for one, built in zip(self.callbacks, self.built, strict=True):
            changed = {
                key: value for key, value in vars(one).items() if repr(value) != built.get(key) and key[0] != "_"
            }
            for key, value in changed.items():
                # as text: NaN is not equal to itself, and what JSON cannot hold becomes a text of its text
                if repr(json.loads(json.dumps(value, default=repr, skipkeys=True))) != repr(value):
                    raise ConfigError(
                        f"callbacks: no checkpoint would bring back {type(one).__name__}.{key}, so a resumed run would "
                        "be another one. A callback may keep numbers, texts, lists, and mappings from texts; if it "
                        "never stops the training, let it say so (gives = frozenset())"
                    )
            found.append(changed)
        return self.world.gather(found)

    def put(self, of_ranks: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Give the callbacks of this rank what `out` has returned, at any number of ranks."""
        for one, kept in zip(self.callbacks, of_ranks[min(self.world.rank, len(of_ranks) - 1)], strict=False):
            vars(one).update(kept)
