"""The contrasts of a tier by the rules of the preregistration: interval, test and result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from benchmarks.evidence.contrasts import Contrast, holm_of_planned
from benchmarks.evidence.losses import HELD_OUT
from benchmarks.evidence.tiers import Figure, Pair, Tier
from sftmix.tools.compare.statistics import Counts, interval_seeds, interval_two_level, mean_sd, sign_flip

MARGIN = 0.01
"""Nats per token: a difference whose interval lies inside +-MARGIN is called equal."""


class Endpoint(NamedTuple):
    """A primary endpoint: its name on the page, its words, and its figure."""

    name: str
    words: str
    figure: Figure


LAST = Endpoint("last", "after the last step", lambda summary: summary["eval_nll_after"])
BEST = Endpoint("best", "at the best epoch", lambda summary: summary["eval_nll_best"])
ENDPOINTS = (LAST, BEST)


@dataclass(frozen=True)
class Finding(Contrast):
    """A - B at one endpoint, in nats per token; lower is better for A.

    differences  seed -> A - B
    over         of the interval: "seeds and examples" or "seeds"
    p            before Holm's correction; None where nothing is tested
    """

    pair: Pair
    differences: Mapping[int, float]
    sd: float | None
    over: str | None = None
    p: float | None = None

    @property
    def name(self) -> str:
        return f"{self.pair[0]} − {self.pair[1]}"


def findings(tier: Tier, endpoint: Endpoint, pairs: Sequence[Pair], *, tested: bool) -> list[Finding]:
    """Return the contrasts at an endpoint, those of which nothing is there left out.

    tested  if True, the sign-flip test of a finished tier, with Holm's correction over all of `pairs`
    """
    found = [_finding(tier, endpoint, pair) for pair in pairs if tier.differences(pair, endpoint.figure)]
    if not (tested and tier.complete):
        return found
    p_values = [sign_flip(list(each.differences.values())) for each in found]
    adjusted = holm_of_planned(p_values, len(pairs))
    return [replace(each, p=p, p_holm=q) for each, p, q in zip(found, p_values, adjusted, strict=True)]


def _finding(tier: Tier, endpoint: Endpoint, pair: Pair) -> Finding:
    differences = tier.differences(pair, endpoint.figure)
    mean, sd = mean_sd(list(differences.values()))
    interval, over = _interval(tier, endpoint, pair, differences) if tier.complete else (None, None)
    return Finding(mean, interval, None, MARGIN, pair, differences, sd, over)


def _interval(
    tier: Tier, endpoint: Endpoint, pair: Pair, differences: Mapping[int, float]
) -> tuple[tuple[float, float] | None, str | None]:
    """Return the 95% interval and what it is over, both None for one seed."""
    counts = _counts(tier, pair, list(differences)) if endpoint is LAST and len(differences) > 1 else None
    if counts is not None:
        return interval_two_level(*counts), "seeds and examples"
    ends = interval_seeds(list(differences.values()))
    return ends, "seeds" if ends else None


def _counts(tier: Tier, pair: Pair, seeds: Sequence[int]) -> tuple[Counts, Counts] | None:
    """Return the held-out losses and tokens of both arms, [S, N]; None if those of some run were not kept."""
    if tier.losses is None:
        return None
    held_out = tier.losses.rows == HELD_OUT
    sides = []
    for arm in pair:
        found = [nll for nll in (tier.losses.nll_sum(arm, seed) for seed in seeds) if nll is not None]
        if len(found) < len(seeds):
            return None
        losses = np.stack(found)[:, held_out]
        sides.append(Counts(losses, np.broadcast_to(tier.losses.n_tokens[held_out].astype(np.float64), losses.shape)))
    return sides[0], sides[1]


def described(tier: Tier) -> list[Pair]:
    """Return pairs that are no planned contrast: each arm with the baseline, label smoothing with the recipe."""
    pairs = [(arm, tier.baseline) for arm in tier.arms if arm != tier.baseline]
    pairs += [(arm, "SFTMix") for arm in tier.arms if arm == "LabelSmoothing"]
    return [pair for pair in pairs if pair not in tier.contrasts]
