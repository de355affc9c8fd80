"""Selectors: the choice of the examples to train on (arXiv 2410.05248, section 5.5)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.plain import as_list
from sftmix.common.rng import generator, stable_hash
from sftmix.common.tables import existing_file
from sftmix.components.base import Selector, check_labels, check_number
from sftmix.types import Rows, Scores


class All(Selector):
    """Every example."""

    def select(self, scores: Scores, *, seed: int) -> Rows:
        return np.arange(len(scores), dtype=np.int64)


class Longest(Selector):
    """The examples with the most response tokens (arXiv 2402.04833): its authors call it hard to beat at its cost.

    Equal lengths are ordered by example id.
    """

    def __init__(self, *, k: int = 1000) -> None:
        """k: number of examples to keep."""
        _check_k(k)
        self.k = k

    def select(self, scores: Scores, *, seed: int) -> Rows:
        lengths = scores.n_tokens.tolist()
        return _first(self.k, [(-length, example_id) for length, example_id in zip(lengths, scores.id, strict=True)])


class Random(Selector):
    """Random examples, chosen by id and seed: the control for every other selection."""

    def __init__(self, *, k: int) -> None:
        """k: number of examples to keep."""
        _check_k(k)
        self.k = k

    def select(self, scores: Scores, *, seed: int) -> Rows:
        return _first(self.k, [stable_hash(seed, "random_selector", example_id) for example_id in scores.id])


class ScoreAtLeast(Selector):
    """The examples with a high enough score: AlpaGasus keeps those rated 4.5 of 5 by a judge (arXiv 2307.08701).

    The score is a column of numbers among the rows' fields, or the number of response tokens (`n_tokens`). True and
    false count as 1 and 0; text is read as a number. An example without a value is not selected.
    """

    def __init__(self, *, field: str, threshold: float) -> None:
        """
        field: name of the row field that holds the score.
        threshold: the smallest score that is kept.
        """
        check_number("selector.threshold", threshold, hint="a finite number")
        self.field = field
        self.threshold = threshold

    def select(self, scores: Scores, *, seed: int) -> Rows:
        columns: dict[str, Sequence[Any]] = {"n_tokens": scores.n_tokens.tolist(), **scores.columns}
        scored = zip(scores.id, _column(columns, self.field), strict=True)
        values = [self._number(example_id, value, columns) for example_id, value in scored]
        return np.flatnonzero([value >= self.threshold for value in values]).astype(np.int64)

    def _number(self, example_id: str, value: Any, columns: dict[str, Sequence[Any]]) -> float:
        """Return the score; -inf if there is none."""
        if value is None or value == "":
            return -math.inf
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(
                f"selector.field {self.field!r} is not a column of numbers: example {example_id} has {value!r}; "
                f"there are {_listed(columns)}"
            )
        return number


class WithLabel(Selector):
    """The examples with certain labels, for instance NTP on the High examples alone (section 5.2)."""

    def __init__(self, *, labels: list[str] | str) -> None:
        """labels: the labels to keep, as data.label_field or data.labels gives them."""
        self.labels = as_list(labels)

    def select(self, scores: Scores, *, seed: int) -> Rows:
        values = check_labels("selector.labels", self.labels, scores)
        return np.flatnonzero([label in self.labels for label in values]).astype(np.int64)


class Shares(Selector):
    """A mixture of sources: so many examples with each value of a row field, chosen by id and seed.

    Examples with another value, or without one, are not selected.
    """

    def __init__(self, *, field: str, shares: dict[str, float], k: int) -> None:
        """
        field: name of the row field that holds the source, or `label`.
        shares: value of the field -> share of the k examples; the shares add up to 1, and parts are rounded.
        k: number of examples to keep.
        """
        _check_k(k)
        if not shares or min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1):
            raise ConfigError(f"selector.shares is {shares}; allowed: shares from 0 that add up to 1")
        self.field = field
        self.shares = shares
        self.k = k

    def select(self, scores: Scores, *, seed: int) -> Rows:
        columns = {**scores.columns, "label": scores.label or [None] * len(scores)}
        values, chosen = list(map(str, _column(columns, self.field))), list[int]()
        for value, share in self.shares.items():
            rows, wanted = [row for row, source in enumerate(values) if source == value], round(share * self.k)
            if wanted > len(rows):
                raise ConfigError(
                    f"selector.shares asks for {wanted:,} of the {self.k:,} examples with {self.field} {value!r}, but "
                    f"there are {len(rows):,}; use a smaller k or share"
                )
            chosen += sorted(rows, key=lambda row: stable_hash(seed, "shares", scores.id[row]))[:wanted]
        return np.sort(np.asarray(chosen, dtype=np.int64))


class S2L(Selector):
    """S2L (arXiv 2403.07384): examples spread evenly over clusters of loss trajectories of a small reference.

    The trajectory of an example is its mean NLL at each checkpoint of an earlier run. From the smallest cluster on,
    each gives an equal part of what is still to be chosen, or all that it has. Examples without a trajectory are not
    selected.
    """

    def __init__(self, *, k: int, dynamics: str | os.PathLike[str], clusters: int = 100) -> None:
        """
        k: number of examples to keep.
        dynamics: a dynamics.parquet of the same rows, for instance of `sftmix confidence` with a small model.
        clusters: number of clusters of k-means, at least 1.
        """
        _check_k(k)
        if clusters < 1:
            raise ConfigError(f"selector.clusters is {clusters}; allowed: 1 and above")
        self.k = k
        self.dynamics = dynamics
        self.clusters = clusters

    def files(self) -> Sequence[str]:
        return [existing_file("selector.dynamics", self.dynamics)]

    def select(self, scores: Scores, *, seed: int) -> Rows:
        from scipy.cluster.vq import kmeans2

        from sftmix.common.tables import read_dynamics

        dynamics = read_dynamics(self.dynamics).of(scores.id)
        rows = np.flatnonzero(dynamics.scored)
        if self.k > len(rows):
            raise ConfigError(
                f"selector.k is {self.k:,}, but selector.dynamics {self.dynamics} has the trajectories of "
                f"{len(rows):,} examples; use a smaller k, or dynamics of the same rows"
            )
        rng = generator(seed, "s2l")
        with warnings.catch_warnings(action="ignore"):  # an empty cluster gives nothing
            _, cluster = kmeans2(dynamics.mean_nll[rows], min(self.clusters, len(rows)), minit="++", seed=rng)
        members = [rng.permutation(rows[cluster == c]) for c in np.unique(cluster)]
        members.sort(key=len)
        chosen: list[int] = []
        for place, rows_of_cluster in enumerate(members):
            chosen += rows_of_cluster[: (self.k - len(chosen)) // (len(members) - place)].tolist()
        return np.sort(np.asarray(chosen, dtype=np.int64))


def _column(columns: Mapping[str, Sequence[Any]], field: str) -> Sequence[Any]:
    if field not in columns:
        raise ConfigError(f"selector.field is {field!r}, which is no field of the rows; there are {_listed(columns)}")
    return columns[field]


def _first(k: int, keys: Sequence[Any]) -> Rows:
    """Return the k rows with the smallest keys."""
    if k > len(keys):
        raise ConfigError(f"selector.k is {k:,}, but there are only {len(keys):,} examples; use a smaller k")
    return np.sort(np.asarray(sorted(range(len(keys)), key=keys.__getitem__)[:k], dtype=np.int64))


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"selector.k is {k}; allowed: a number of examples, 1 and above")


def _listed(columns: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, columns)) or "none"
