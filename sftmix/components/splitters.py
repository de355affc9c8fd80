"""Splitters: scores -> groups, most confident first."""

import numpy as np

from sftmix.components.base import Splitter
from sftmix.components.component import require
from sftmix.components.labels import check_labels
from sftmix.disk.places import place_of
from sftmix.disk.tables import existing_file, read_split
from sftmix.ranks.rng import stable_hash
from sftmix.types import MOST_GROUPS, UNPAIRED, Rows, Scores, Split
from sftmix.words.errors import DataError
from sftmix.words.given import as_list, spelling

HALVES = ("half_a", "half_b")
"""Names of two halves, neither of them the more confident."""


class Median(Splitter):
    """The paper's split: two equal halves at the median of the confidence.

    Equal confidences are ordered by example id, so that the split does not depend on the order of the file. With an
    odd number of scored examples the median one is unpaired; examples that could not be scored (NaN) are also unpaired.
    """

    def split(self, scores: Scores, *, seed: int) -> Split:
        return _equal_groups(scores.ranked(), scores, ("confident", "unconfident"))


class Quantile(Splitter):
    """Groups of equal size by the rank of the confidence, for a pairing between levels (the paper's future work).

    The ranking is the same as in Median, which has two levels. If the number of scored examples is not a multiple of
    the levels, some in the middle of the ranking are unpaired.
    """

    def __init__(self, *, levels: int = 4):
        """levels: number of groups, from 2 to 128: level_1 the most confident."""
        require(2 <= levels <= MOST_GROUPS, "splitter.levels", levels, f"from 2 to {MOST_GROUPS}")
        self.levels = levels

    def split(self, scores: Scores, *, seed: int) -> Split:
        return _equal_groups(scores.ranked(), scores, tuple(f"level_{level + 1}" for level in range(self.levels)))


class QualityLabel(Splitter):
    """Labels instead of confidence (section 5.2): rows with some labels against rows with others.

    The groups are called high and low, and may differ in size. Rows without a label or with another one are unpaired:
    they get NTP, no Mixup. Labels come from a field of the rows (data.label_field) or from their files (data.labels).
    """

    needs = frozenset()

    def __init__(self, *, high: str | list[str], low: str | list[str]):
        """
        high: label or labels of the rows that replace the confident half.
        low: label or labels of the rows that replace the unconfident half.
        """
        # a label may be a number or a truth value in the rows: 1.0 is 1, and True is true
        self.high, self.low = ([*map(spelling, as_list(labels))] for labels in (high, low))
        require(set(self.high).isdisjoint(self.low), "splitter.low", low, f"none of splitter.high, {high!r}")

    def split(self, scores: Scores, *, seed: int) -> Split:
        check_labels("splitter.high", self.high, scores)
        labels = check_labels("splitter.low", self.low, scores)
        group = [0 if label in self.high else 1 if label in self.low else UNPAIRED for label in labels]
        return Split(group=np.asarray(group, dtype=np.int8), names=("high", "low"))


class RandomSplit(Splitter):
    """Control: two random equal halves, chosen by example id and seed, without any reference model."""

    needs = frozenset()

    def split(self, scores: Scores, *, seed: int) -> Split:
        ranked = sorted(range(len(scores)), key=lambda row: stable_hash(seed, "random_split", scores.id[row]))
        return _equal_groups(ranked, scores, HALVES)


class LengthMatched(Splitter):
    """Control: two halves with almost the same response lengths, without any reference model.

    Confidence goes with length; these halves hardly differ in length. Examples are ranked by response tokens (equal
    ones in random order), and a coin sends one of each two neighbours to each half. Both draws are keyed by seed and
    ids. With an odd number of examples, the one in the middle is unpaired.
    """

    needs = frozenset()

    def split(self, scores: Scores, *, seed: int) -> Split:
        def rank(row: int) -> tuple[int, int]:
            return int(scores.n_tokens[row]), stable_hash(seed, "length_matched", scores.id[row])

        ranked = sorted(range(len(scores)), key=rank)
        if len(ranked) % 2:
            del ranked[len(ranked) // 2]
        halves = np.asarray(ranked, dtype=np.int64).reshape(-1, 2)  # column 0 is half_a, column 1 half_b
        for pair in halves:
            if stable_hash(seed, "length_matched", *[scores.id[row] for row in pair]) % 2:
                pair[:] = pair[::-1]
        return _equal_groups(halves.T.flatten(), scores, HALVES)


class FromFile(Splitter):
    """The split of another run, or one you made, read from a split.parquet and joined by example id.

    The file must cover exactly the examples that are trained on.
    """

    needs = frozenset()

    def __init__(self, *, path: str):
        """path: the split file, with the columns id and group (a group's name, or unpaired)."""
        self.path = path

    def files(self) -> list[str]:
        return [existing_file("splitter.path", self.path)]

    def split(self, scores: Scores, *, seed: int) -> Split:
        return read_split(place_of(self.path), of=scores.id)[1]


def _equal_groups(ranked: list[int] | Rows, scores: Scores, names: tuple[str, ...]) -> Split:
    """Return equal groups of the ranked rows, in their order; the rest in the middle, and unranked rows, unpaired."""
    if len(ranked) < len(names):
        raise DataError(
            f"a split into {len(names)} groups needs at least {len(names)} scored examples, but only {len(ranked)} of "
            f"{len(scores)} are; give more rows, or raise data.max_length or reference.model.max_length if responses "
            "were cut off"
        )
    # 7 ranked in 3 groups: ranks 0 1, 2 4, 5 6, and 3 in none
    size, rest = divmod(len(ranked), len(names))
    middle = (len(ranked) - rest) // 2
    group = np.full(len(scores), UNPAIRED, dtype=np.int8)
    group[np.delete(ranked, slice(middle, middle + rest))] = np.repeat(np.arange(len(names)), size)
    return Split(group=group, names=names)
