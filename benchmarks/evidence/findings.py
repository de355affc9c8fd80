"""The contrasts of a tier by the rules of the preregistration: interval, test and result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.evidence.study import HELD_OUT
from benchmarks.evidence.tiers import DIRECTION, Pair, Tier
from sftmix.tools.compare.statistics import (
    ALPHA,
    holm,
    interval,
    mean_sd,
    per_example,
    sign_flip,
)
from sftmix.types import Float64

MARGIN = 0.01
"""Nats per token: a difference whose interval lies inside +-MARGIN is called equal."""
LAST, BEST = "eval_nll_after", "eval_nll_best"
"""The primary endpoints: held-out NLL after the last step, and at the best epoch."""


@dataclass(frozen=True)
class Finding:
    """A - B at one endpoint over the seeds, in nats per token; lower is better for A.

    differences  seed -> A - B
    mean, sd     of the differences
    interval     95%; None for one seed, or where the runs are not all there
    over         of the interval: "seeds and examples" or "seeds"
    p, p_holm    before and after Holm's correction; None where nothing is tested
    claims       if False, the seeds are too few by the plan to call anything equal or different
    """

    pair: Pair
    differences: Mapping[int, float]
    mean: float
    sd: float | None
    interval: Sequence[float] | None = None
    over: str | None = None
    p: float | None = None
    p_holm: float | None = None
    claims: bool = True

    @property
    def result(self) -> str:
        """The result in words."""
        if self.interval is None:
            return "unfinished" if self.p_holm is None else "one seed"
        if not self.claims:
            return "no claim"
        equal = self.interval[0] > -MARGIN and self.interval[1] < MARGIN
        if self.p_holm is not None and self.p_holm <= ALPHA:
            direction = "lower" if self.mean < 0 else "higher"
            return f"different: {direction}" + (f", and equal within {MARGIN}" if equal else "")
        if equal:
            return f"equal within {MARGIN}"
        return "not tested" if self.p_holm is None else "undecided"


def findings(tier: Tier, endpoint: str, pairs: Sequence[Pair], *, tested: bool) -> list[Finding]:
    """Return the contrasts at an endpoint, those of which nothing is there left out.

    tested  if True, the sign-flip test of a finished tier, with Holm's correction over all of `pairs`
    """
    measured = [_finding(tier, endpoint, pair) for pair in pairs if tier.differences(pair, endpoint)]
    if not (tested and tier.complete):
        return measured
    p_values = [sign_flip(list(each.differences.values())) for each in measured]
    adjusted = holm_of_planned(p_values, len(pairs))
    return [replace(each, p=p, p_holm=q) for each, p, q in zip(measured, p_values, adjusted, strict=True)]


def holm_of_planned(p_values: Sequence[float], planned: int) -> list[float]:
    """Return Holm's p values of the measured ones of so many planned contrasts.

    One without any value counts among the planned ones: it makes the others no more significant.
    """
    return holm([*p_values, *[1.0] * (planned - len(p_values))])[: len(p_values)]


def _finding(tier: Tier, endpoint: str, pair: Pair) -> Finding:
    differences = tier.differences(pair, endpoint)
    values = list(differences.values())
    finding = Finding(pair, differences, *mean_sd(values), claims=tier.name not in DIRECTION)
    if not tier.complete or len(values) < 2:
        return finding
    # The losses of single examples are those after the last step.
    of_examples = _differences(tier, pair, [*differences]) if endpoint == LAST else None
    over = "seeds" if of_examples is None else "seeds and examples"
    return replace(finding, interval=interval(values if of_examples is None else of_examples), over=over)


def _differences(tier: Tier, pair: Pair, seeds: Sequence[int]) -> Float64 | None:
    """Return f64[S, N], A - B of the held-out examples' parts in the NLL; None if those of some run were not kept."""
    if tier.losses is None:
        return None
    held_out = tier.losses.rows == HELD_OUT
    runs = [(arm, seed) for arm in pair for seed in seeds]
    if not tier.losses.nll_sum.keys() >= {*runs}:
        return None
    sums = [tier.losses.nll_sum[run] for run in runs]
    tokens = np.tile(tier.losses.n_tokens[held_out], (len(sums), 1))
    parts = per_example(np.stack(sums)[:, held_out], tokens)
    return parts[: len(seeds)] - parts[len(seeds) :]
