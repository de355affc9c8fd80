"""The weights of the best held-out evaluation of a stage (checkpoint.keep_best), to export and not to resume from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sftmix.common.checkpoints import BEST
from sftmix.common.errors import CheckpointError
from sftmix.common.world import World
from sftmix.training.checkpoint import CheckpointStore


class BestWeights:
    """The best weights so far, in STAGE/best. A resumed stage goes on with those that it kept before."""

    def __init__(self, stage: Path, world: World) -> None:
        self._store, self._world = CheckpointStore(stage / BEST, keep=1, world=world), world
        self._nll, self.evaluated = math.inf, -1
        self._store.clean()
        try:
            step = self._store.newest_valid()
        except CheckpointError as error:  # the stage itself is not harmed
            warnings.warn(f"{error}; the best weights are looked for anew", stacklevel=2)
            return
        if step is not None:
            self._nll = self._store.state(step)["eval_nll"]

    def copies_to_come(self) -> int:
        """Return how many copies may come to the disk at one time: the old one goes when the new one stands."""
        return 1 if self._store.steps() else 2

    def offer(self, step: int, module: nn.Module, metrics: Mapping[str, float]) -> None:
        """Keep the weights after `step` if `metrics` has an evaluation of theirs, better than all before.

        All ranks call it; the metrics of rank 0, which writes the log, decide for all. `evaluated` is the last step
        that had an evaluation.
        """
        given = metrics.get("eval_nll") if self._world.is_main else None
        found, nll = self._world.sum([given is not None, given or 0.0])
        if not found:
            return
        self.evaluated = step
        if nll < self._nll:
            self._nll = nll
            self._store.save(step, module, None, {"eval_nll": nll})
