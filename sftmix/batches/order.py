"""Data sets as batching reads them, and the examples of each step.

`TrainingOrder` makes the global batches of a stage from the pairs of each epoch: a pure function of (pairs, seed,
step), so a resume needs only the step. An epoch is a list of *units* (`epoch_units`), which `global_batches` cuts. A
unit is a pair of slots, or a single slot; its slots stay in one micro-batch. Units are arrays until a step has them.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import numpy as np

from sftmix.disk.hashes import sha256_json
from sftmix.options.training import TrainingOptions
from sftmix.ranks.rng import generator
from sftmix.types import Bool, Encoded, Int64, Rows
from sftmix.words.errors import ConfigError
from sftmix.words.given import as_written

# ------------------------------------------------------------------------------------------------------------ data sets


class TokenisedRows(Protocol):
    """A data set as batching needs it: number of rows, tokens and id of each row, and rows."""

    @property
    def lengths(self) -> Int64: ...
    @property
    def ids(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Encoded: ...


@dataclass
class RowSubset:
    """Some rows of a data set, in the given order, as a data set."""

    data: TokenisedRows
    rows: Rows

    @property
    def lengths(self) -> Int64:
        return self.data.lengths[self.rows]

    @property
    def ids(self) -> list[str]:
        return [self.data.ids[row] for row in self.rows.tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Encoded:
        return self.data[int(self.rows[row])]


class ResponsesAlone(RowSubset):
    """Some rows, each cut down to the first token of its sequence and its response tokens.

    The first token (BOS, or the first of the chat template) has to stay: a model predicts no token that has none before
    it. So the response keeps its number of tokens.
    """

    @property
    def lengths(self) -> Int64:
        return np.array([len(self[row].input_ids) for row in range(len(self))], dtype=np.int64)

    def __getitem__(self, row: int) -> Encoded:
        whole = super().__getitem__(row)
        if whole.starts is not None:
            raise ConfigError("plain text has no instructions, so there are no responses to score alone")
        # target 0 0 1 1 1 -> places 0 2 3 4, whose targets are 0 1 1 1
        kept = np.concatenate([[0], np.flatnonzero(whole.target[1:]) + 1])
        return replace(whole, input_ids=whole.input_ids[kept], target=np.arange(len(kept)) > 0, weight=None)


# ---------------------------------------------------------------------------------------------------- order of a stage


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in a batch. A row that appears again in the same epoch has `ntp_weight` 0."""

    row: int
    ntp_weight: float = 1.0


Unit = tuple[Slot, ...]
Made = TypeVar("Made")


def digest(units: Sequence[Unit]) -> str:
    """Return a short hash of the rows of some units: of their numbers, their order, and which are a pair."""
    # [[0, 3], [1, 2]] and [[0], [3], [1, 2]] have other hashes
    return sha256_json([[slot.row for slot in unit] for unit in units])[:16]


class TrainingOrder:
    """The global batches of a stage.

    n_rows       rows that are trained on
    pairs_of     epoch -> i64[P, 2] pairs, or None for singles
    singles_of   epoch -> i64[N], the rows of an epoch without pairs in their order, or None: they are shuffled
    rows         None: the rows are 0..n_rows-1; or i64[n_rows], the row of the data set behind each of these numbers
    pairs_known  False if the pairs of an epoch are made only when it begins; each example is then one slot of an epoch
    """

    def __init__(
        self,
        n_rows: int,
        pairs_of: Callable[[int], Rows | None] = lambda epoch: None,
        *,
        options: TrainingOptions,
        seed: int,
        pairs_known: bool = True,
        singles_of: Callable[[int], Rows | None] = lambda epoch: None,
        rows: Rows | None = None,
    ) -> None:
        self._n_rows, self._singles_of, self._rows = n_rows, singles_of, rows
        self._pairs_of = pairs_of
        self._size = options.global_batch_size
        self._seed = seed
        self._pairs_known = pairs_known
        self._batches_of = lru_cache(maxsize=1)(self._made)
        self.ends: list[int] = []
        """Steps done at the end of each epoch; epochs or max_steps may end the last epoch early."""
        self.total_steps = 0
        most = math.inf if options.max_steps is None else options.max_steps
        epochs = as_written(options.epochs) if options.max_steps is None else math.inf
        # As fractions: epochs 1.1 of 10 batches are 11 steps; of floats 1.1 - 1 is above 0.1, which makes 12.
        while epochs > len(self.ends) and self.total_steps < most:
            epoch = len(self.ends)
            # 3 batches an epoch and epochs 1.5: the ends are 3 and 5
            steps = self.total_steps + math.ceil(min(1, epochs - epoch) * self._count(epoch))
            self.total_steps = int(min(steps, most))
            self.ends.append(self.total_steps)

    @property
    def rows(self) -> Rows:
        """i64[n_rows], rows of the data set that are trained on."""
        return np.arange(self._n_rows) if self._rows is None else self._rows

    @property
    def _expected(self) -> int:
        """Global batches of an epoch in which every example has one slot."""
        return math.ceil(self._n_rows / self._size)

    def _count(self, epoch: int) -> int:
        """Return the number of an epoch's global batches, which are made only if an example may have several slots."""
        pairs = self._pairs_of(epoch) if self._pairs_known else None
        # Of an odd size, a batch leaves a slot free before a pair that does not fit, so there may be more of them.
        several = pairs is not None and (self._size % 2 or len(np.unique(pairs)) < pairs.size)
        return len(self._batches_of(epoch)) if several else self._expected

    def _made(self, epoch: int) -> "Runs[list[Unit]]":
        """Make the global batches of an epoch; ConfigError if there are more than a single run has planned for."""
        pairs = self._pairs_of(epoch)
        singles = self._singles_of(epoch)
        units = epoch_units(self._n_rows, pairs, epoch=epoch, seed=self._seed, singles=singles, rows=self._rows)
        batches = global_batches(units, self._size)
        if not self._pairs_known and len(batches) != self._expected:
            raise ConfigError(
                f"epoch {epoch + 1} has {len(batches)} steps instead of {self._expected}: its pairs repeat examples, "
                "which a single run cannot plan for; use a splitter with equal groups and a pairing that takes "
                "each example once, or --reference TrainedReference"
            )
        return batches

    def epoch_of(self, step: int) -> int:
        """Epoch of step `step` (both from 0)."""
        return bisect.bisect_right(self.ends, step)  # ends 3, 6: step 2 is in epoch 0, step 3 in epoch 1

    def batch(self, step: int) -> list[Unit]:
        """Units of the global batch of step `step`."""
        epoch = self.epoch_of(step)
        return self._batches_of(epoch)[step - (self.ends[epoch - 1] if epoch else 0)]


# ---------------------------------------------------------------------------------------------------- units of an epoch


class Runs(Generic[Made]):
    """Runs of what arrays hold, from each of `starts` i[runs + 1] to the next; a run is made when it is asked for.

    A million rows as objects would be 188 MiB.
    """

    def __init__(self, starts: Int64, make: Callable[[int, int], Made]) -> None:
        self.starts = starts
        self._make = make

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, run: int) -> Made:
        """Return a run; IndexError beyond the last, which ends a loop over them."""
        return self._make(int(self.starts[run]), int(self.starts[run + 1]))


def epoch_units(
    n_rows: int,
    pairs: Rows | None,
    *,
    epoch: int,
    seed: int,
    singles: Rows | None = None,
    rows: Rows | None = None,
) -> Runs[Unit]:
    """Units of one epoch, in training order; every row carries NTP loss exactly once.

    Rows in no pair are shuffled and spread evenly among the pairs, two at a time, so that every global batch but the
    last is full.

    pairs    i64[P, 2] from the pair sampler, or None for an epoch of singles
    singles  i64[N], their order in such an epoch; None: shuffled
    rows     i64[n_rows], the row of the data set behind each number; None: the number itself
    """
    if pairs is None:
        order = generator(seed, "order", epoch).permutation(n_rows) if singles is None else singles
        return _units(order if rows is None else rows[order], np.ones(n_rows, dtype=bool), np.arange(n_rows + 1))
    # [[0, 3], [1, 3]] -> first 1 1 1 0: the second slot of row 3 has its Mixup, and no NTP
    first = np.zeros(pairs.size, dtype=bool)
    first[np.unique(pairs, return_index=True)[1]] = True
    unpaired = generator(seed, "singles", epoch).permutation(np.delete(np.arange(n_rows), pairs))
    twos, odd = divmod(len(unpaired), 2)  # two singles share a place
    total = len(pairs) + twos
    paired = np.ones(total, dtype=bool)
    paired[((np.arange(twos) + 0.5) * total / max(twos, 1)).astype(int)] = False  # 2 pairs, 3 twos: 0, 2, 4
    slots, carries, begins = np.empty((total, 2), dtype=int), np.ones((total, 2), dtype=bool), np.ones((total, 2), bool)
    slots[paired], slots[~paired] = pairs, unpaired[: 2 * twos].reshape(-1, 2)
    carries[paired] = first.reshape(-1, 2)
    begins[paired, 1] = False
    starts = np.append(np.flatnonzero(begins), np.arange(2 * total, 2 * total + odd + 1))  # an odd single is last
    numbers = np.append(slots, unpaired[2 * twos :])
    return _units(numbers if rows is None else rows[numbers], np.append(carries, np.ones(odd, dtype=bool)), starts)


def _units(rows: Int64, carries: Bool, starts: Int64) -> Runs[Unit]:
    """Return units as arrays: rows i64[S] of the slots, which of them carry NTP loss b[S], starts i64[units + 1]."""
    rows = rows.astype(np.int32)

    def unit(start: int, end: int) -> Unit:
        return tuple(map(Slot, rows[start:end].tolist(), carries[start:end].astype(float).tolist()))

    return Runs(starts.astype(np.int32), unit)


def global_batches(units: Runs[Unit], global_batch_size: int) -> Runs[list[Unit]]:
    """Cut the epoch into global batches of `global_batch_size` slots; the last may be short."""
    cuts = [0]
    while cuts[-1] < len(units):  # pairs 0-3 and 1-2, then 4 and 5, in batches of 3: 0 3 | 1 2 4 | 5
        full = int(units.starts[cuts[-1]]) + global_batch_size
        cuts.append(max(int(np.searchsorted(units.starts, full, side="right")) - 1, cuts[-1] + 1))
    return Runs(np.array(cuts), lambda start, end: [units[number] for number in range(start, end)])
