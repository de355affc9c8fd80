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
        deciding = [one for one in callbacks if Need.STOP in one.gives]
        self.world = world
        self.built = [(one, {key: repr(value) for key, value in vars(one).items()}) for one in deciding]

    def out(self) -> list[list[dict[str, Any]]]:
        """Return them for each rank and callback; ConfigError for the first that JSON would not bring back equal."""
        found = []
        for one, built in self.built:
            changed = {
                key: value for key, value in vars(one).items() if repr(value) != built.get(key) and key[0] != "_"
            }
            found.append(changed)
            for key, value in json.loads(json.dumps(changed, default=repr, skipkeys=True)).items():
                if repr(value) != repr(changed[key]):  # as text: NaN is not equal to itself
                    raise ConfigError(
                        f"callbacks: no checkpoint would bring back {type(one).__name__}.{key}, so a resumed run would "
                        "be another one. A callback may keep numbers, texts, lists, and mappings from texts; if it "
                        "never stops the training, let it say so (gives = frozenset())"
                    )
        return self.world.gather(found)

    def put(self, of_ranks: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Give the callbacks of this rank what `out` has returned, at any number of ranks."""
        for (one, _), kept in zip(self.built, of_ranks[self.world.rank % len(of_ranks)], strict=False):
            vars(one).update(kept)
