"""Differences between two arms by groups of examples: by confidence, response length, half of the split and topic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.evidence.losses import HELD_OUT, SAMPLE, Names, TableLosses
from benchmarks.evidence.tiers import Pair, Tier
from sftmix.common.rng import generator
from sftmix.tools.compare.statistics import Counts, holm, interval_seeds, interval_two_level, sign_flip
from sftmix.types import Float64, Int64

Mask = npt.NDArray[np.bool_]
Named = dict[str, Mask]
MIDDLE = ("second quarter", "third quarter")
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

    inside           seed -> difference over all tokens of the group
    beyond           seed -> the same minus the difference over all tokens of the other rows of the kind
    interval_inside  95%, over seeds and examples; over seeds alone where the group is one example
    interval_beyond  95%, over seeds; None for one seed
    asked            False where a group before it is all of its other rows, and so asks the same
    p                exact two-sided sign-flip test of `beyond` over the seeds; None where it is not asked
    p_holm           after Holm's correction over all groups that were looked at
    p_largest        after the correction by the largest of all groups (`largest_p`)
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
    asked: bool
    p: float | None = None
    p_holm: float | None = None
    p_largest: float | None = None


def groups_of(losses: TableLosses) -> Iterator[Group]:
    """Yield the groups of each kind of rows; one without rows, or with all of them, is no group."""
    log_confidence = -losses.base_nll_sum / np.maximum(losses.n_tokens, 1)
    for rows in (HELD_OUT, SAMPLE):
        kind = losses.rows == rows
        named = {
            **_quarters("confidence", ("least confident", *MIDDLE, "most confident"), losses, kind, log_confidence),
            **_quarters("length", ("shortest", *MIDDLE, "longest"), losses, kind, losses.n_tokens),
            **_named("half", losses.half, kind, first="unconfident"),
            **_named("topic", losses.topic, kind),
        }
        for name, members in named.items():
            others = kind & ~members
            if members.any() and others.any():
                yield Group(rows, name, members, others)


def _quarters(by: str, words: Sequence[str], losses: TableLosses, kind: Mask, values: Float64 | Int64) -> Named:
    """Return the rows of a kind by quartile of their values; equal values are ordered by id."""
    ranked = sorted(np.flatnonzero(kind).tolist(), key=lambda k: (values[k], losses.ids[k]))
    parts = np.array_split(np.array(ranked, dtype=np.int64), 4)
    return {f"{by}: {word}": np.isin(np.arange(len(kind)), part) for word, part in zip(words, parts, strict=True)}


def _named(by: str, names: Names, kind: Mask, first: str = "") -> Named:
    words = sorted({name for name in names[kind] if name is not None}, key=lambda word: (word != first, word))
    return {f"{by}: {word}": kind & (names == word) for word in words}


# ---------------------------------------------------------------------------------------- differences


def found_in(tier: Tier, losses: TableLosses, pair: Pair) -> list[Found]:
    """Return A - B in each group, without tests; a group whose rows were not measured at some seed is left out."""
    seeds = _seeds(tier, losses, pair)
    if not seeds:
        return []
    ours, theirs = (_of_seeds(losses, arm, seeds) for arm in pair)
    found, asked = [], list[Mask]()
    for group in groups_of(losses):
        if _measured(group, ours, theirs):
            again = any((group.others == before).all() for before in asked)
            asked.append(group.members)
            found.append(_difference(tier.name, pair, group, seeds, losses.n_tokens, ours, theirs, asked=not again))
    return found


def left_out(tier: Tier, losses: TableLosses, pair: Pair) -> Iterator[str]:
    """Yield sentences that name the seeds and the groups of a table that `found_in` leaves out."""
    seeds, where = _seeds(tier, losses, pair), f"`{tier.name}`, {pair[0]} − {pair[1]}"
    finished = [seed for seed in tier.seeds if all(seed in tier.runs.get(arm, {}) for arm in pair)]
    lost = sorted(set(finished) - set(seeds))
    if lost:
        yield f"{where}: left out, since their losses were not kept: seeds {', '.join(map(str, lost))}."
    if not finished:
        yield f"{where}: left out, since no seed has both arms."
    if seeds:
        ours, theirs = (_of_seeds(losses, arm, seeds) for arm in pair)
        names = [f"{g.name} ({g.rows})" for g in groups_of(losses) if not _measured(g, ours, theirs)]
        if names:
            yield f"{where}: left out, since some seed lacks their rows: {'; '.join(names)}."


def _seeds(tier: Tier, losses: TableLosses, pair: Pair) -> list[int]:
    """Return the planned seeds at which the losses of both arms are kept."""
    kept = [set(losses.seeds(arm)) for arm in pair]
    return [seed for seed in tier.seeds if all(seed in own for own in kept)]


def _of_seeds(losses: TableLosses, arm: str, seeds: Sequence[int]) -> Float64:
    """Return f64[S, N], the losses of an arm's runs."""
    return np.stack([nll for nll in (losses.nll_sum(arm, seed) for seed in seeds) if nll is not None])


def _measured(group: Group, ours: Float64, theirs: Float64) -> bool:
    own = group.members | group.others
    return not (np.isnan(ours[:, own]).any() or np.isnan(theirs[:, own]).any())


def _difference(
    table: str,
    pair: Pair,
    group: Group,
    seeds: Sequence[int],
    n_tokens: Int64,
    ours: Float64,
    theirs: Float64,
    *,
    asked: bool,
) -> Found:
    inside, others = (
        (ours[:, own] - theirs[:, own]).sum(axis=1) / n_tokens[own].sum() for own in (group.members, group.others)
    )
    beyond = inside - others
    own = group.members
    tokens = np.broadcast_to(n_tokens[own].astype(np.float64), (len(seeds), int(own.sum())))
    return Found(
        table,
        pair,
        group.rows,
        group.name,
        int(own.sum()),
        dict(zip(seeds, inside.tolist(), strict=True)),
        dict(zip(seeds, beyond.tolist(), strict=True)),
        float(inside.mean()),
        float(beyond.mean()),
        interval_two_level(Counts(ours[:, own], tokens), Counts(theirs[:, own], tokens)),
        interval_seeds(beyond),
        asked,
    )


# ----------------------------------------------------------------------------------------------- tests


def tested(found: Sequence[Found]) -> list[Found]:
    """Return the groups with their p values, corrected over all of them together."""
    asked = [place for place, each in enumerate(found) if each.asked]
    beyond = [found[place].beyond for place in asked]
    p_values = [sign_flip(list(each.values())) for each in beyond]
    done = list(found)
    for place, p, p_holm, p_largest in zip(asked, p_values, holm(p_values), largest_p(beyond), strict=True):
        done[place] = replace(found[place], p=p, p_holm=p_holm, p_largest=p_largest)
    return done


def largest_p(differences: Sequence[Mapping[int, float]]) -> list[float]:
    """Return p values of many means of paired differences (seed -> difference), corrected for looking at all of them.

    It is the share of sign assignments under which the largest statistic of all is at least the observed one of a
    group. A seed turns the sign of all its differences at once, as they share its runs, so groups that vary together
    count as few: the smallest p does not grow with their number (Westfall and Young, Resampling-based multiple testing,
    1993). The statistic is |sum| / root of the sum of squares, which no turning of signs changes: groups of any size
    are compared alike. A seed that a group lacks adds nothing to it.
    """
    seeds = sorted({seed for each in differences for seed in each})
    d = np.array([[each.get(seed, 0.0) for each in differences] for seed in seeds]).reshape(
        len(seeds), len(differences)
    )
    root = np.sqrt((d**2).sum(axis=0))
    d = d / np.where(root > 0, root, 1.0)
    if len(seeds) <= EXACT:
        bits = (np.arange(2 ** len(seeds))[:, None] >> np.arange(len(seeds))) & 1
    else:
        bits = generator(0, "largest of all groups").integers(0, 2, size=(2**EXACT, len(seeds)))
        bits[0] = 0  # the observed signs are among them
    largest = np.abs((1 - 2 * bits) @ d).max(axis=1, initial=0.0)
    return [float((largest >= abs(each) - 1e-12).mean()) for each in d.sum(axis=0)]
