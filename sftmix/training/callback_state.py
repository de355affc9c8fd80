"""What callbacks that may stop a training keep of its past: a checkpoint holds it, and it comes back equal."""

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

from sftmix.components.base import Callback
from sftmix.components.component import Need
from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError


class CallbackState:
    """The attributes that callbacks which may stop have changed since the stage began, but those named _NAME."""

    def __init__(self, callbacks: Sequence[Callback], world: World) -> None:
        self.callbacks, self.world = [one for one in callbacks if Need.STOP in one.gives], world
        self.built = [{key: repr(value) for key, value in vars(one).items()} for one in self.callbacks]

    def out(self) -> list[list[dict[str, Any]]]:
        """Return them for each rank and callback; all ranks call it.

        Raises ConfigError on every rank for the first that JSON would not bring back equal on any.
        """
        lost, found = list[str](), list[dict[str, Any]]()
        for one, built in zip(self.callbacks, self.built, strict=True):
            public = {key: value for key, value in vars(one).items() if not key.startswith("_")}
            found.append({key: value for key, value in public.items() if repr(value) != built.get(key)})
            lost += [f"{type(one).__name__}.{key}" for key, value in found[-1].items() if not _comes_back(value)]
        if name := next(chain.from_iterable(self.world.gather(lost)), None):
            raise ConfigError(
                f"callbacks: no checkpoint would bring back {name}, so a resumed run would be another one. A callback "
                "may keep numbers, texts, lists, and mappings from texts; if it never stops the training, let it say "
                "so (gives = frozenset())"
            )
        return self.world.gather(found)

    def put(self, of_ranks: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Give the callbacks of this rank what `out` has returned, at any number of ranks."""
        for one, kept in zip(self.callbacks, of_ranks[min(self.world.rank, len(of_ranks) - 1)], strict=False):
            vars(one).update(kept)


def _comes_back(value: Any) -> bool:
    with suppress(TypeError, ValueError):
        return repr(json.loads(json.dumps(value))) == repr(value)  # NaN is not equal to itself
    return False
