"""Differences between two arms by groups of examples: by confidence, response length, half of the split and topic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.evidence.losses import HELD_OUT, SAMPLE, Names, TableLosses
from benchmarks.evidence.tiers import Pair, Tier
from sftmix.common.rng import generator
from sftmix.compare.statistics import Counts, holm, interval_seeds, interval_two_level, sign_flip
from sftmix.types import Float64

Mask = npt.NDArray[np.bool_]
QUARTERS = ("second quarter", "third quarter")
EXACT = 14
"""Largest number of seeds for which `largest_p` uses all 2^n assignments of signs; above, as many of them by chance."""


@dataclass(frozen=True)
class Group:
    """Rows of a kind that have something in common.

    rows     HELD_OUT or SAMPLE
    name     of the group
    members  bool[N], over all rows of the table
    others   bool[N], all other rows of the same kind
    """

    rows: str
    name: str
    members: Mask
    others: Mask


@dataclass(frozen=True)
class Found:
    """A - B in a group, in nats per token; lower is better for A.

    inside     seed -> difference over all tokens of the group
    beyond     seed -> the same minus the difference over all tokens of the other rows of the kind
    intervals  95%: of `inside` over seeds and examples, of `beyond` over seeds; None where seeds are too few
    p          exact two-sided sign-flip test of `beyond` over the seeds; None where the group before it, which is all of
               its other rows, asks the same
    p_holm     after Holm's correction over all groups that were looked at
    p_largest  after the correction by the largest of all groups (`largest_p`)
    """

    table: str
    pair: Pair
    rows: str
    group: str
    examples: int
    inside: Mapping[int, float]
    beyond: Mapping[int, float]
    mean_inside: float
    mean_beyond: float
    interval_inside: tuple[float, float] | None
    interval_beyond: tuple[float, float] | None
    p: float | None = None
    p_holm: float | None = None
    p_largest: float | None = None


def groups_of(losses: TableLosses) -> Iterator[Group]:
    """Yield the groups of each kind of rows; a quarter without rows, or one with all of them, is no group."""
    log_confidence = -losses.base_nll_sum / np.maximum(losses.n_tokens, 1)
    for rows in (HELD_OUT, SAMPLE):
        kind = losses.rows == rows
        named = {
            **_quarters(losses, kind, log_confidence, "least confident", "most confident"),
            **_quarters(losses, kind, losses.n_tokens, "shortest", "longest"),
            **_named("half of the split", losses.half, kind, first="unconfident"),
            **_named("topic", losses.topic, kind),
        }
        for name, members in named.items():
            others = kind & ~members
            if members.any() and others.any():
                yield Group(rows, name, members, others)


def _quarters(losses: TableLosses, kind: Mask, values: npt.NDArray, lowest: str, highest: str) -> dict[str, Mask]:
    """Return the rows of a kind by quartile of their values; equal values are ordered by id."""
    by = "confidence of the base model" if lowest == "least confident" else "response length"
    ranked = sorted(np.flatnonzero(kind).tolist(), key=lambda k: (values[k], losses.ids[k]))
    parts = np.array_split(np.array(ranked, dtype=np.int64), 4)
    return {
        f"{by}: {word}": np.isin(np.arange(len(kind)), part)
        for word, part in zip((lowest, *QUARTERS, highest), parts, strict=True)
    }


def _named(by: str, names: Names, kind: Mask, first: str = "") -> dict[str, Mask]:
    words = sorted({name for name in names[kind] if name is not None}, key=lambda word: (word != first, word))
    return {f"{by}: {word}": kind & (names == word) for word in words}
