"""A global batch dealt to ranks and micro-batches: `deal`, within the limits of the training options.

The loss is a sum over the global batch, so an example may be in any of its micro-batches. Units are dealt so that few
token slots are padding, and so that the ranks of a micro-step have about the same work. A unit is never cut.
"""

import bisect
import heapq
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch

from sftmix.batches.collate import token_slots
from sftmix.batches.order import Slot, Unit
from sftmix.options.training import TrainingOptions
from sftmix.types import Int64

WORTH_SORTING = 0.9
"""Micro-batches of similar length may need at most this share of the token slots of balanced ones. Else they are not
worth it: the longest examples are then in one micro-batch, whose memory is the peak."""

BALANCE_STEPS = 7
"""Halvings in the search for the size of the largest micro-batch: they leave about 1% of the interval."""

EVEN = 1.01
"""If the slowest rank has at most this share of the mean tokens, no other deal is tried."""

NOISE = (0.0, *[0.2] * 15)
"""Sigma of the noise on the logarithm of the units' weights, for each order that is tried; the first has none."""

MOST_LENGTH_GROUPS = 16
"""Most length groups of a micro-batch on CPU: more would save less padding than their passes cost."""

Deal = list[list[Unit]]
"""The units of each micro-batch; on W ranks, every W micro-batches are one micro-step."""


class MicroStep(NamedTuple):
    """One forward and backward on every rank at once.

    ranks       the units of each rank
    n_segments  segments into which each rank pads its slots; a rank with fewer slots has idle segments, because FSDP
                gathers parameters once per segment on all ranks
    """

    ranks: Deal
    n_segments: int


def deal(
    units: Sequence[Unit],
    lengths: Int64,
    options: TrainingOptions,
    *,
    ranks: int,
    device: torch.device,
    padding_free: bool,
) -> list[MicroStep]:
    """Deal one global batch out to ranks and accumulation steps, in as few micro-steps as the options allow.

    lengths       i64[N], tokens of each row of the data set
    padding_free  all examples of a micro-batch share one row

    A unit that needs more than `micro_batch_tokens` gets a micro-batch of its own. A rank that is left without a unit
    repeats the shortest slot with NTP weight 0, so that it joins every collective.
    """
    (examples, tokens), groups = options.limits(device.type), options.length_groups
    if tokens == "auto":  # not decided: of a device that is elsewhere
        tokens = None
    # On a CPU, one group for every two examples; on a GPU a single one, since several passes cost launches.
    if groups is None:
        expected = examples or int((tokens or lengths.sum()) // lengths.mean())
        groups = min(MOST_LENGTH_GROUPS, max(1, expected // 2)) if device.type == "cpu" else 1
    tokens_of = {slot.row: int(lengths[slot.row]) for unit in units for slot in unit}
    # 2 * len(units) limits nothing: a unit has at most two slots.
    limits = _Limits(tokens_of, ranks, examples or 2 * len(units), tokens, 1 if padding_free else groups, padding_free)
    # Sorted, so that the ranks of a micro-step have about the same work.
    bins = sorted(_deal(units, limits), key=limits.cost, reverse=True)
    shortest = min((slot for unit in units for slot in unit), key=lambda slot: tokens_of[slot.row])
    filler = (Slot(shortest.row, 0.0),)
    # Pairs 0-3 and 1-2, single 4, lengths 5 4 6 3 2, two ranks, two examples: rank 0 gets 1-2, rank 1 gets 0-3; then
    # rank 0 gets 4, and rank 1 a filler, 4 again with NTP weight 0.
    steps = []
    for start in range(0, len(bins), ranks):
        shares = [share or [filler] for share in bins[start : start + ranks]]
        slots = max(sum(map(len, share)) for share in shares)
        steps.append(MicroStep(shares, min(limits.segments, slots)))
    return steps


# ------------------------------------------------------------------------------------------- dealing


class _Limits(NamedTuple):
    """The limits of a micro-batch, and measures of a set of units against them; `lengths` are those of rows."""

    lengths: Mapping[int, int]
    ranks: int
    examples: int
    tokens: int | None
    segments: int
    padding_free: bool

    def weight(self, unit: Unit) -> int:
        return sum([self.lengths[slot.row] for slot in unit])

    def cost(self, units: Sequence[Unit]) -> int:
        """Count the token slots of the units in one micro-batch, with idle segments."""
        lengths = [self.lengths[slot.row] for unit in units for slot in unit]
        idle = max(0, self.segments - len(lengths)) if self.ranks > 1 else 0  # of FSDP; other wrappings leave them out
        return token_slots(lengths, self.segments, padding_free=self.padding_free) + idle

    def holds(self, units: Sequence[Unit], tokens: int | None) -> bool:
        """True if the units fit into one micro-batch of at most `tokens` token slots; a single unit always does."""
        if len(units) < 2:
            return True
        if sum(map(len, units)) > self.examples:
            return False
        # The real tokens first: they are counted faster than padded ones.
        return tokens is None or (sum(map(self.weight, units)) <= tokens and self.cost(units) <= tokens)

    def total(self, bins: Deal) -> int:
        """Count the token slots of the slowest rank of each micro-step, and add them up."""
        # two ranks: bins of 9, 8, 3, 2 slots are two micro-steps, 9 + 3
        costs = [self.cost(units) for units in bins]
        return sum(max(costs[k : k + self.ranks]) for k in range(0, len(costs), self.ranks))


def _deal(units: Sequence[Unit], limits: _Limits) -> Deal:
    """Deal the units in the better of two ways: with fewer micro-steps, or if both need as many, by WORTH_SORTING.

    The balanced deal gives each micro-batch about as many tokens. The other puts units of similar length together,
    which saves padding.
    """
    # the fewest micro-batches that the limits could allow
    fewest_bins = sum(map(len, units)) / limits.examples
    if limits.tokens is not None:
        # a unit above the limit fills one micro-batch, and not more
        fewest_bins = max(fewest_bins, sum(min(limits.weight(unit), limits.tokens) for unit in units) / limits.tokens)
    steps = math.ceil(fewest_bins / limits.ranks)
    balanced = _spread_tokens(units, limits, steps * limits.ranks)
    # Even without any padding the other deal would save too little.
    if balanced is not None and sum(map(limits.weight, units)) > WORTH_SORTING * limits.ranks * limits.total(balanced):
        return balanced
    similar = _by_length(units, limits)
    similar_steps = len(similar) // limits.ranks
    # Units that do not fill their micro-batches need more of them, but not more than the other deal.
    while balanced is None and steps < similar_steps:
        steps += 1
        balanced = _spread_tokens(units, limits, steps * limits.ranks)
    if balanced is None:
        return similar
    worth = WORTH_SORTING * limits.total(balanced)
    return balanced if steps < similar_steps or limits.total(similar) > worth else similar


def _spread_tokens(units: Sequence[Unit], limits: _Limits, n_bins: int) -> Deal | None:
    """Deal pairs, then singles, the heaviest first, each to the micro-batch of fewest tokens that has room for it.

    Without padding several orders are tried, each by weights with noise: the strict order is seldom the best. Return
    None if no deal is within the limits.
    """
    best: Deal | None = None
    least, weights = math.inf, [limits.weight(unit) for unit in units]
    noise = np.random.default_rng(0)  # the same numbers on each rank, which deals for all
    for sigma in NOISE if limits.padding_free and limits.ranks > 1 else NOISE[:1]:
        factors = noise.lognormal(sigma=sigma, size=len(units)).tolist()
        # Pairs first: singles dealt before would leave one free place here and there, where no pair fits.
        keys = [(-len(unit), -weight * factor) for unit, weight, factor in zip(units, weights, factors, strict=True)]
        ordered = sorted(range(len(units)), key=keys.__getitem__)
        bins = _in_order([(units[k], weights[k]) for k in ordered], limits, n_bins)
        if bins is not None and (total := limits.total(bins)) < least:
            best, least = bins, total
        if limits.ranks * least <= EVEN * sum(weights):
            break
    return best


def _in_order(units: Sequence[tuple[Unit, int]], limits: _Limits, n_bins: int) -> Deal | None:
    """Deal each unit to the micro-batch of fewest tokens that has room for it; None: one has none, or gets too much.

    units  with their tokens; pairs are before singles
    """
    bins: Deal = [[] for _ in range(n_bins)]
    tokens, free = [0] * n_bins, [limits.examples] * n_bins
    for size, alike in groupby(units, key=lambda of: len(of[0])):
        # A heap of those with room: the one of fewest tokens, and of equals the first, is on top.
        room = [(tokens[k], k) for k in range(n_bins) if free[k] >= size]
        heapq.heapify(room)
        for unit, weight in alike:
            if not room:
                return None
            best = heapq.heappop(room)[1]
            bins[best].append(unit)
            tokens[best] += weight
            free[best] -= size
            if free[best] >= size:
                heapq.heappush(room, (tokens[best], best))
    return bins if all(limits.holds(share, limits.tokens) for share in bins) else None


def _by_length(units: Sequence[Unit], limits: _Limits) -> Deal:
    """Cut the units, in order of length, into micro-batches: in few micro-steps, and the largest one small."""
    ordered = sorted(units, key=lambda unit: -max(limits.lengths[slot.row] for slot in unit))
    bins = _cut(ordered, limits, limits.tokens)
    n_bins = len(bins) + -len(bins) % limits.ranks  # 5 on 4 ranks: 8, two whole micro-steps
    # The smallest size of the largest micro-batch that needs no more of them, by halving an interval.
    high = max(map(limits.cost, bins))
    if limits.tokens:
        high = min(high, limits.tokens)
    low = min(high, sum(map(limits.weight, units)) // n_bins)  # equal shares, no padding: no less is possible
    # If each has as many examples as are allowed, none can be smaller.
    full = sum(map(len, units)) == n_bins * limits.examples
    for _ in range(0 if full or limits.ranks == 1 else BALANCE_STEPS):
        middle = (low + high) // 2
        smaller = _cut(ordered, limits, middle)
        if len(smaller) <= n_bins:
            bins, high = smaller, middle
        else:
            low = middle

    # In each micro-step, the units are dealt to the ranks anew, if that relieves the slowest rank.
    def load(step):
        costs = [limits.cost(units) for units in step]
        return max(costs), sum(costs)

    dealt = []
    for start in range(0, len(bins), limits.ranks):
        step = bins[start : start + limits.ranks]
        step += [[] for _ in range(limits.ranks - len(step))]
        redealt = _spread_tokens([unit for units in step for unit in units], limits, limits.ranks)
        dealt += min((step, redealt or step), key=load)
    return dealt


def _cut(units: list[Unit], limits: _Limits, tokens: int | None) -> Deal:
    """Cut units into runs, each as long as fits into a micro-batch of `tokens` token slots."""
    bins, start = [], 0
    real = [0, *accumulate(map(limits.weight, units))]  # tokens of the first n units
    while start < len(units):
        # No run is longer than real tokens allow; padded ones are counted for few units.
        most = len(units) if tokens is None else bisect.bisect_right(real, real[start] + tokens) - 1
        longer = range(2, min(most - start, limits.examples) + 1)
        # One more unit never costs less, so bisection finds the longest run that fits.
        # If 2 and 3 units fit and 4 do not, the place of 4 in 2, 3, 4, ... is 2: a run of 3.
        rest = units[start : start + len(longer) + 1]
        count = 1 + bisect.bisect_left(longer, True, key=lambda n: not limits.holds(rest[:n], tokens))
        bins.append(rest[:count])
        start += count
    return bins
