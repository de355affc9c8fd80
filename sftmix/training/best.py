"""The weights of the best held-out evaluation of a stage (checkpoint.keep_best)."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sftmix.disk.files import BEST
from sftmix.ranks.world import World
from sftmix.training.checkpoint import CheckpointStore


class BestWeights:
    """The weights of the best held-out evaluation so far, in STAGE/best, to export and not to resume from.

    A resumed stage goes on with those that it kept before.

    evaluated  the last step that had an evaluation
    """

    def __init__(self, stage: Path, world: World) -> None:
        self.store = CheckpointStore(stage / BEST, keep=1, world=world)
        self.evaluated, self._nll = -1, math.inf
        self.store.clean()

    def go_on(self, evaluations: Mapping[int, float]) -> None:
        """After a resume only an evaluation that is better than all so far counts, also if their weights are not kept.

        Weights that are kept of a worse evaluation are removed. NaN and infinity are no evaluations, as in `offer`.
        """
        # min() of {2: nan, 4: 1.5} is nan, which no other is below.
        self._nll = best = min((nll for nll in evaluations.values() if nll < math.inf), default=math.inf)
        # A step that has no evaluation yet is after the checkpoint, and will be made again.
        # {2: 1.5, 4: 1.4} with the weights of step 2 alone: step 4 was made while keep_best was off.
        kept = any(evaluations.get(step, best) <= best for step in self.store.steps())
        if best < math.inf and not kept and self.store.world.is_main:
            shutil.rmtree(self.store.directory, ignore_errors=True)
            print(f"checkpoint.keep_best: the best evaluation so far, {best:.4f}, has no weights kept")

    def offer(self, step: int, module: nn.Module, metrics: Mapping[str, float]) -> None:
        """Keep the weights after `step` if `metrics` has an evaluation of theirs, better than all before.

        All ranks call it; the metrics of rank 0, which writes the log, decide for all.
        """
        nll = self.store.world.share(metrics.get("eval_nll"))  # None: this step was not evaluated
        if nll is None:
            return
        self.evaluated = step
        if nll < self._nll:
            self._nll = nll
            self.store.save(step, module, None, {"eval_nll": nll})
            self.store.finish()
