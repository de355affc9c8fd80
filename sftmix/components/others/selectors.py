"""Selectors: parts of the examples by length, score, label, source or chance (arXiv 2410.05248, section 5.5)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.fields import listed
from sftmix.common.plain import as_list, spelling
from sftmix.common.rng import stable_hash
from sftmix.components.base import Selector
from sftmix.components.component import check_labels, require
from sftmix.types import Rows, Scores


class Longest(Selector):
    """The examples with the most response tokens (arXiv 2402.04833): its authors call it hard to beat at its cost.

    Equal lengths are ordered by example id.
    """

    def __init__(self, *, k: int = 1000):
        """k: number of examples to keep."""
        self.k = k

    def select(self, scores: Scores, *, seed: int) -> Rows:
        return _first(self.k, list(zip((-scores.n_tokens).tolist(), scores.id, strict=True)))


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
        column = _column({"n_tokens": scores.n_tokens.tolist(), **scores.columns}, self.field)
        try:
            values = np.array([-math.inf if value in (None, "") else float(value) for value in column])
            if np.isnan(values).any():
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


class Shares(Selector):
    """A mixture of sources: so many examples with each value of a row field, chosen by id and seed.

    Examples with another value are not selected; one without a value has "".
    """

    def __init__(self, *, field: str, shares: dict[str, float], k: int):
        """
        field: name of the row field that holds the source, or `label` for the label, if the rows have one.
        shares: value of the field -> share of the k examples; the shares add up to 1, and parts are rounded.
        k: number of examples to keep.
        """
        are_shares = min(shares.values(), default=-1) >= 0 and math.isclose(sum(shares.values()), 1)
        require(are_shares, "selector.shares", shares, "shares from 0 that add up to 1")
        self.field, self.shares, self.k = field, shares, k

    def select(self, scores: Scores, *, seed: int) -> Rows:
        columns = {**scores.columns, "label": scores.label} if scores.label else scores.columns
        values = ["" if value is None else spelling(value) for value in _column(columns, self.field)]
        chosen = []
        for value, share in self.shares.items():
            rows = [row for row, source in enumerate(values) if source == spelling(value)]
            wanted = round(share * self.k)
            allowed = f"from 0 to {len(rows)} of the {self.k} examples with {self.field} {value!r}: there are no more"
            allowed += f"; the values there are {listed(sorted(set(values)))}"
            require(0 <= wanted <= len(rows), "selector.shares", self.shares, allowed)
            chosen += sorted(rows, key=lambda row: stable_hash(seed, "shares", scores.id[row]))[:wanted]
        return np.sort(chosen)


def _column(columns: Mapping[str, Sequence[Any]], field: str) -> Sequence[Any]:
    require(field in columns, "selector.field", field, f"a field of the rows: {', '.join(columns)}")
    return columns[field]


def _first(k: int, keys: Sequence[Any]) -> Rows:
    """Return the k rows with the smallest keys."""
    require(1 <= k <= len(keys), "selector.k", k, f"from 1 to {len(keys)}, the number of examples")
    return np.sort(sorted(range(len(keys)), key=keys.__getitem__)[:k])
