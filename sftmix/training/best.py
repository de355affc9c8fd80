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
    """The best weights so far, in STAGE/best. A resumed stage goes on with those that it kept before.

    evaluated  the last step that had an evaluation
    """

    def __init__(self, stage: Path, world: World) -> None:
        self.store = CheckpointStore(stage / BEST, keep=1, world=world)
        self.evaluated, self._nll = -1, math.inf
        self.store.clean()
        try:
            step = self.store.newest_valid()
        except CheckpointError as error:  # the stage itself is not harmed
            warnings.warn(f"{error}; the best weights are looked for anew", stacklevel=2)
            return
        if step is not None:
            self._nll = self.store.state(step)["eval_nll"]

    def offer(self, step: int, module: nn.Module, metrics: Mapping[str, float]) -> None:
        """Keep the weights after `step` if `metrics` has an evaluation of theirs, better than all before.

        All ranks call it; the metrics of rank 0, which writes the log, decide for all.
        """
        nll = self.store.world.share(metrics.get("eval_nll"))
        if nll is None:
            return
        self.evaluated = step
        if nll < self._nll:
            self._nll = nll
            self.store.save(step, module, None, {"eval_nll": nll})
