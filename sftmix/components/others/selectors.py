"""Selectors: parts of the examples by length, score, label or chance (arXiv 2410.05248, section 5.5)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sftmix.components.base import Selector
from sftmix.components.component import require
from sftmix.components.labels import check_labels
from sftmix.ranks.rng import stable_hash
from sftmix.types import Rows, Scores
from sftmix.words.errors import ConfigError
from sftmix.words.given import as_list, spelling


class Longest(Selector):
    """The examples with the most response tokens (arXiv 2402.04833): its authors call it hard to beat at its cost.

    Equal lengths are ordered by example id.
    """

    def __init__(self, *, k: int = 1000):
        """k: number of examples to keep."""
        self.k = k

    def select(self, scores: Scores, *, seed: int) -> Rows:
        return _first(self.k, list(zip((-scores.n_tokens).tolist(), scores.id, strict=True)))  # (-120, "row-7")


class Random(Selector):
    """Random examples, chosen by id and seed: the control for every other selection."""

    def __init__(self, *, k: int):
        """k: number of examples to keep."""
        self.k = k

    def select(self, scores: Scores, *, seed: int) -> Rows:
        return _first(self.k, [stable_hash(seed, "random_selector", example_id) for example_id in scores.id])


class ScoreAtLeast(Selector):
    """The examples with a high enough score: AlpaGasus keeps those rated 4.5 of 5 by a judge (arXiv 2307.08701).

    The score is a column of numbers among the rows' fields, or the number of response tokens (`n_tokens`). True and
    false count as 1 and 0; text is read as a number. An example without a value is not selected.
    """

    def __init__(self, *, field: str, threshold: float):
        """
        field: name of the row field that holds the score.
        threshold: the smallest score that is kept.
        """
        self.field, self.threshold = field, threshold

    def select(self, scores: Scores, *, seed: int) -> Rows:
        columns = {"n_tokens": scores.n_tokens.tolist(), **scores.columns}
        require(self.field in columns, "selector.field", self.field, f"a field of the rows: {', '.join(columns)}")
        try:
            column = columns[self.field]
            values = np.array([-math.inf if value in (None, "") else float(value) for value in column])
            if np.isnan(values).any():  # of a column of floats, or of the text "nan"
                raise ValueError(f"example {scores.id[np.isnan(values).argmax()]} has nan")
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"selector.field {self.field!r} is not a column of numbers: {error}") from None
        return np.flatnonzero(values >= self.threshold)


class WithLabel(Selector):
    """The examples with certain labels, for instance NTP on the High examples alone (section 5.2)."""

    def __init__(self, *, labels: list[str] | str):
        """labels: the labels to keep, as data.label_field or data.labels gives them."""
        self.labels = [*map(spelling, as_list(labels))]

    def select(self, scores: Scores, *, seed: int) -> Rows:
        values = check_labels("selector.labels", self.labels, scores)
        return np.flatnonzero([label in self.labels for label in values])


def _first(k: int, keys: Sequence[Any]) -> Rows:
    """Return the k rows with the smallest keys."""
    require(1 <= k <= len(keys), "selector.k", k, f"from 1 to {len(keys)}, the number of examples")
    return np.sort(sorted(range(len(keys)), key=keys.__getitem__)[:k])
