"""Which examples are step s: a pure function of (pairs, seed, step), so that a resume needs only the step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from sftmix.data.batching import Unit, epoch_units, global_batches
from sftmix.errors import ConfigError
from sftmix.options import TrainingOptions
from sftmix.types import Rows


class TrainingOrder:
    """The global batches of a stage.

    n_rows    rows of the training set
    pairs_of  epoch -> i64[P, 2] pairs, or None for shuffled singles
    known     False where an epoch's pairs come to be only when it begins: every example is then one slot of each epoch
    """

    def __init__(
        self,
        n_rows: int,
        pairs_of: Callable[[int], Rows | None],
        *,
        options: TrainingOptions,
        seed: int,
        known: bool = True,
    ) -> None:
        self._n_rows, self._pairs_of, self._seed, self._known = n_rows, pairs_of, seed, known
        self._size = options.global_batch_size
        self._cached: tuple[int, list[list[Unit]]] = (-1, [])
        self.ends: list[int] = []
        """Steps done at the end of each epoch; the last may be cut short by epochs or max_steps."""
        self._lay_out(options)
        self.total_steps = self.ends[-1]

    def _lay_out(self, options: TrainingOptions) -> None:
        wanted = math.inf if options.max_steps is not None else _decimal(options.epochs)
        done, epoch = 0, 0
        while wanted > epoch and (options.max_steps is None or done < options.max_steps):
            share = min(1, wanted - epoch)
            batches = self._batches_in(epoch)
            done += math.ceil(share * batches)
            if options.max_steps is not None:
                done = min(done, options.max_steps)
            self.ends.append(done)
            epoch += 1

    def _batches_in(self, epoch: int) -> int:
        """Global batches of an epoch, without building them where every example has one slot and batches are full."""
        pairs = self._pairs_of(epoch) if self._known else None
        once = pairs is None or len(np.unique(pairs)) == pairs.size
        if once and (pairs is None or self._size % 2 == 0):
            return math.ceil(self._n_rows / self._size)
        return len(self._epoch(epoch))

    def _epoch(self, epoch: int) -> list[list[Unit]]:
        if self._cached[0] != epoch:
            units = epoch_units(self._n_rows, self._pairs_of(epoch), epoch=epoch, seed=self._seed)
            batches = global_batches(units, self._size)
            expected = math.ceil(self._n_rows / self._size)
            if not self._known and len(batches) != expected:
                raise ConfigError(
                    f"epoch {epoch + 1} has {len(batches)} steps instead of {expected}: its pairs repeat examples, "
                    "which a single run cannot plan for; use a splitter with equal groups and a pairing that takes "
                    "each example once, or --reference TrainedReference"
                )
            self._cached = (epoch, batches)
        return self._cached[1]

    def epoch_of(self, step: int) -> int:
        """Epoch of step `step` (both from 0)."""
        return bisect.bisect_right(self.ends, step)

    def batch(self, step: int) -> list[Unit]:
        """Units of the global batch of step `step`."""
        epoch = self.epoch_of(step)
        return self._epoch(epoch)[step - (self.ends[epoch - 1] if epoch else 0)]

    def ends_epoch(self, steps_done: int) -> bool:
        return steps_done in self.ends


def _decimal(number: float) -> Fraction:
    """The fraction that was written: 1.1 is 11/10, whose tenth of an epoch of 10 batches is 1 step and not 2."""
    return Fraction(number).limit_denominator(1_000_000)
