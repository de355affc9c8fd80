"""Pair samplers that no experiment of the paper has: controls, by length, levels, and distances of confidence."""

import math
from typing import Literal

import numpy as np

from sftmix.components.base import PairSampler
from sftmix.components.component import Need, require, require_one_of
from sftmix.components.pairing import RandomPairs, between, within
from sftmix.ranks.rng import generator
from sftmix.types import UNPAIRED, Rows, Scores, Split
from sftmix.words.given import as_written

LevelRule = Literal["mirrored", "neighbours", "extremes"]

SWAP_ROUNDS = 32
"""Rounds in which ConfidenceGapPairs exchanges partners. For gaps up to 0.4, more rounds no longer change the spread of
the distances; closer to 0.5, some pairs stay as they started, half the ranks apart."""


class SameGroupPairs(PairSampler):
    """Control: both examples come from the same group, so that confident examples never meet unconfident ones.

    A group with an odd number of examples leaves one out, a different one in every epoch.
    """

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        rng = generator(seed, "pairs", epoch)
        matched = [within(split.rows(group), scores, rng) for group in range(len(split.names))]
        return rng.permutation(np.concatenate(matched))


class AnyPairs(PairSampler):
    """Control: random pairs of any two examples, whatever their groups (but not the unpaired): Mixup without the split.

    With `--splitter RandomSplit`, no reference is trained. If the number of examples is odd, one is left out, a
    different one in every epoch.
    """

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        rng = generator(seed, "pairs", epoch)
        return within(np.flatnonzero(split.group != UNPAIRED), scores, rng)


class PermutedPairs(RandomPairs):
    """Control: the global batches of RandomPairs, in which each example has a random partner, of either half.

    Batches, their order and, without dropout, the NTP loss are those of RandomPairs at the same seed: the partners
    alone differ. An objective could not do this in its plan, which sees a micro-batch alone: partners would depend on
    how the batch is cut, and on the ranks. In a batch of 16 examples, 8 of 15 partners are still of the other half,
    and other tokens are aligned: compare `mu_effective` as well. Where the splitter leaves examples unpaired, these
    take places in batches, whose pairs then differ in a few examples as well.
    """

    def __init__(self, *, global_batch_size: int = 32):
        """global_batch_size: examples among which partners are drawn; a run refuses another than its own."""
        require(global_batch_size >= 2, "pairing.global_batch_size", global_batch_size, "2 and above")
        self.global_batch_size = global_batch_size

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        ordered, rng = super().pairs(split, scores, epoch=epoch, seed=seed), generator(seed, "partners", epoch)
        size = self.global_batch_size // 2
        batches = np.split(ordered, range(size, len(ordered), size))
        return np.concatenate([within(batch.ravel(), scores, rng) for batch in batches])


class LengthMatchedPairs(PairSampler):
    """Random matching of responses of similar length, in random order: more response tokens are mixed.

    Each group is ranked by response length, the ranks are shuffled within windows of `window` examples, and equal
    ranks are matched.
    """

    def __init__(self, *, window: int = 16):
        """window: number of neighbours in length from which a partner is drawn, at least 1 (1: strictly by length)."""
        require(window >= 1, "pairing.window", window, "1 and above")
        self.window = window

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        rng = generator(seed, "pairs", epoch)
        pairs = between(split.confident, split.unconfident, rng)
        ranks = np.argsort(scores.n_tokens[pairs], axis=0, kind="stable")  # [P, 2], each column by itself
        by_length = np.take_along_axis(pairs, ranks, axis=0)
        for start in range(0, len(by_length), self.window):
            rng.shuffle(by_length[start : start + self.window, 1])
        return rng.permutation(by_length)


class LevelPairs(PairSampler):
    """Pairs between several levels of confidence, as Quantile makes them (finer than two: the paper's future work).

    mirrored    the k-th level with the k-th from the end: first with last, second with last but one, ...
    neighbours  the first level with the second, the third with the fourth, ...
    extremes    the first level with the last; the levels between get NTP, no Mixup
    The first two rules mix every example of a level. With an odd number of levels, the level left over (the middle one,
    or the last) is paired within itself. If two levels differ in size, the smaller one is repeated.
    """

    def __init__(self, *, rule: LevelRule = "mirrored"):
        """rule: the way levels are matched."""
        require_one_of("pairing.rule", rule, LevelRule)
        self.rule = rule

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        rng, last = generator(seed, "pairs", epoch), len(split.names) - 1
        levels = {
            "mirrored": [(k, last - k) for k in range(last // 2 + 1)],  # of 5 levels: 0 4, 1 3, 2 2
            "neighbours": [(k, min(k + 1, last)) for k in range(0, last + 1, 2)],  # 0 1, 2 3, 4 4
            "extremes": [(0, last)],
        }[self.rule]
        matched = [
            between(split.rows(one), split.rows(other), rng) if one != other else within(split.rows(one), scores, rng)
            for one, other in levels
        ]
        return rng.permutation(np.concatenate(matched))


class ConfidenceGapPairs(PairSampler):
    """Continuous confidence instead of halves: random pairs of examples far enough apart in rank.

    The scored examples, except the unpaired, are ranked by confidence (equal ones by id) and matched at random. The
    ranks of partners differ by at least `min_gap` times the number of examples. If this number is odd, the example in
    the middle is left out. Groups play no part. (The paper names continuous confidence as future work.)

    A walk starts from the matching of rank r with r + n/2. In each of its rounds, pairs meet two by two and exchange
    partners, in one of two ways at random, if the gap allows it. The walk is symmetric, so all matchings that it
    reaches are equally likely in the end.
    """

    needs = frozenset({Need.CONFIDENCE})

    def __init__(self, *, min_gap: float = 0.25):
        """min_gap: smallest distance in rank, as a share of the examples, above 0 and at most 0.5. A larger gap leaves
        fewer matchings, only one at 0.5."""
        allowed = "above 0 and at most 0.5, because the example in the middle has nobody farther away"
        require(0 < min_gap <= 0.5, "pairing.min_gap", min_gap, allowed)
        self.min_gap = min_gap

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        ranked, rng = np.array(scores.ranked(), dtype=np.int64), generator(seed, "pairs", epoch)
        ranked = ranked[split.group[ranked] != UNPAIRED]
        if len(ranked) % 2:
            ranked = np.delete(ranked, len(ranked) // 2)
        half, quarter = len(ranked) // 2, len(ranked) // 4
        gap = math.ceil(as_written(self.min_gap) * len(ranked))
        matched = np.stack([np.arange(half), np.arange(half, len(ranked))], axis=1)  # ranks
        for _ in range(SWAP_ROUNDS):
            met = rng.permutation(half)[: 2 * quarter].reshape(2, quarter)
            one, other = matched[met]  # [quarter, 2] each: the pairs 0 4 and 1 5 may become 0 5 and 1 4, or 0 1 and 4 5
            other = np.where(rng.random(quarter)[:, None] < 0.5, other, other[:, ::-1])
            new = np.sort(np.stack([one, other], axis=2), axis=2)  # [quarter, 2, 2]: for each meeting, two new pairs
            allowed = (new[:, :, 1] - new[:, :, 0] >= gap).all(axis=1)
            matched[met[:, allowed]] = new[allowed].swapaxes(0, 1)  # one half of the new pairs for each row of met
        return ranked[rng.permutation(matched)]
