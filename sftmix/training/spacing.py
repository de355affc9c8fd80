"""When a stage saves a checkpoint: by its steps, by the clock, or by what the last one cost.

By the clock, the steps differ from run to run; that changes no number, because a run goes on alike from any of them.
"""

import math
import time

from sftmix.options.training import CheckpointOptions

SHARE = 0.02
"""Largest share of the time that checkpoints take, if nobody chose their distance."""
LEAST_SECONDS, LEAST_STEPS = 120.0, 20
"""Shortest distance of these by the clock, and of those that are made each quarter of a stage whatever they cost."""


class Spacing:
    """The distance of the checkpoints of a stage of `total` steps; the last step has one whatever it is.

    every  steps between two of them; 0: there are none
    since  time.monotonic() of the last one
    """

    def __init__(self, options: CheckpointOptions, total: int) -> None:
        self.total, self.since = total, time.monotonic()
        self.every, self._seconds, self._share = max(LEAST_STEPS, math.ceil(total / 4)), LEAST_SECONDS, SHARE
        if options.every is not None:
            self.every, self._seconds = options.every, math.inf
        elif options.every_seconds is not None:
            self.every, self._seconds, self._share = total, options.every_seconds, math.inf  # whatever one costs

    def due(self, step: int) -> bool:
        """Return True if one is due after `step` steps."""
        return self.every > 0 and (step % self.every == 0 or step == self.total)  # every 3 of 10: 3, 6, 9, 10

    def late(self, cost: float) -> bool:
        """Return True if one is due by the clock of this process.

        cost  seconds that the last one took; 0 before the first
        """
        return time.monotonic() - self.since >= max(self._seconds, cost / self._share)  # a save of 6 s: every 300 s

    def most(self, step: int) -> int:
        """Return the largest number of checkpoints after `step` steps; by the clock each step may have one."""
        every = self.every if self._seconds == math.inf else 1
        # 10 steps, every 3: 4 in all (3, 6, 9, 10), and 3 from step 4 on
        return math.ceil(self.total / every) - step // every if every else 0
