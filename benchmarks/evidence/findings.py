"""The contrasts of a tier by the rules of the preregistration: interval, test, result, and what the result means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.evidence.tiers import Figure, Pair, Tier
from sftmix.compare.statistics import ALPHA, holm, interval_seeds, mean_sd, sign_flip

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
class Finding:
    """A - B at one endpoint.

    differences  seed -> A - B, nats per token; lower is better for A
    interval     95%, None where the tier is unfinished or has one seed
    over         of the interval: "seeds and examples" or "seeds"
    p, p_holm    None where nothing is tested
    """

    pair: Pair
    differences: Mapping[int, float]
    mean: float
    sd: float | None
    interval: tuple[float, float] | None = None
    over: str | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def name(self) -> str:
        return f"{self.pair[0]} − {self.pair[1]}"

    @property
    def different(self) -> bool:
        return self.p_holm is not None and self.p_holm <= ALPHA

    @property
    def lower(self) -> bool:
        return self.different and self.mean < 0

    @property
    def higher(self) -> bool:
        return self.different and self.mean > 0

    @property
    def equal(self) -> bool:
        return self.interval is not None and self.interval[0] > -MARGIN and self.interval[1] < MARGIN

    @property
    def result(self) -> str:
        """The result in words."""
        if self.interval is None:
            return "unfinished"
        equal = f"equal within {MARGIN}"
        if self.different:
            direction = "lower" if self.lower else "higher"
            return f"different: {direction}" + (f", and {equal}: real, too small to matter" if self.equal else "")
        if self.equal:
            return equal
        return "not tested" if self.p_holm is None else "undecided"


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


def in_brackets(interval: Sequence[float] | None) -> str:
    """Write the ends of an interval; "-" without one."""
    return "-" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def holm_of_planned(p_values: Sequence[float], planned: int) -> list[float]:
    """Return Holm's p values of the measured ones of so many planned contrasts.

    One without any value counts among the planned ones: it makes the others no more significant.
    """
    return holm([*p_values, *[1.0] * (planned - len(p_values))])[: len(p_values)]


def _finding(tier: Tier, endpoint: Endpoint, pair: Pair) -> Finding:
    differences = tier.differences(pair, endpoint.figure)
    mean, sd = mean_sd(list(differences.values()))
    if not tier.complete:
        return Finding(pair, differences, mean, sd)
    written = tier.intervals.get(pair) if endpoint is LAST else None
    # An interval of another sitting is of other seeds: then the one over seeds alone stands.
    same = written and list(written.seeds) == list(differences) and math.isclose(written.mean, mean, abs_tol=1e-9)
    if written and same:
        return Finding(pair, differences, mean, sd, written.ends, written.over)
    ends = interval_seeds(list(differences.values()))
    return Finding(pair, differences, mean, sd, ends, "seeds" if ends else None)


def described(tier: Tier) -> list[Pair]:
    """Return pairs that are no planned contrast: each arm with the baseline, label smoothing with the recipe."""
    pairs = [(arm, tier.baseline) for arm in tier.arms if arm != tier.baseline]
    pairs += [(arm, "SFTMix") for arm in tier.arms if arm == "LabelSmoothing"]
    return [pair for pair in pairs if pair not in tier.contrasts]


# ------------------------------------------------------------------------------------- what the results mean

Both = Mapping[str, tuple[Finding, Finding]]
"""Other arm -> SFTMix minus it, at last and at best."""


def meanings(tier: Tier) -> Iterator[str]:
    """Yield what the planned contrasts of a finished, tested tier mean, in the words of the preregistration."""
    ends = [findings(tier, endpoint, tier.contrasts, tested=True) for endpoint in ENDPOINTS]
    both = {last.pair[1]: (last, best) for last in ends[0] for best in ends[1] if best.pair == last.pair}
    lacking = [other for _, other in tier.contrasts if other not in both]
    if lacking:
        yield f"Not to be told: no seed has a figure of SFTMix and of {lacking[0]}."
        return
    yield f"SFTMix to NTP: {_to_ntp(*both['NTP'])}."
    yield f"The split: {_of_the_split(both)}."
    yield f"SFTMix to DecomposedMixup: {_of_the_mixing(*both['DecomposedMixup'])}."


def _to_ntp(last: Finding, best: Finding) -> str:
    if last.lower and best.lower:
        return "a gain: lower at last and best; it helps at this size" + _small(last, best)
    if last.equal and best.equal and not (last.different or best.different):
        return "equal at both; it does nothing that matters here, and costs a reference"
    said = []
    if last.lower:
        said.append("lower at last, not at best: it regularises, and stopping NTP earlier gives as much" + _small(last))
    if best.lower:
        said.append("lower at best alone: a difference at one endpoint is no gain" + _small(best))
    for end, name in ((last, "last"), (best, "best")):
        if end.higher:
            said.append(f"higher at {name}: it hurts there" + _small(end))
    return "; ".join(said) or "undecided"


def _small(*ends: Finding) -> str:
    return " (within 0.01 nat: real, too small to matter)" if all(end.equal for end in ends) else ""


def _of_the_split(both: Both) -> str:
    """Return the result of SFTMix against the two splits that know no confidence, each at both endpoints."""
    controls = [both[name] for name in ("RandomSplit", "LengthMatched")]
    ends = [end for control in controls for end in control]
    if all(end.lower for end in ends):
        return "lower than both controls; it has a part: confidence, or the lengths that go with it" + _small(*ends)
    if all(end.equal for end in ends):
        real = " (some differences are real, and too small to matter)" if any(end.different for end in ends) else ""
        return f"equal to both controls; the confidence of the split has no part in the result{real}"
    if all(end.higher for end in ends):
        return "higher than both controls, which the plan did not foresee: random halves do better here" + _small(*ends)
    return "undecided: not lower than both controls, nor equal to both, at both endpoints"


def _of_the_mixing(last: Finding, best: Finding) -> str:
    if last.lower and best.lower:
        return "lower; mixing itself adds something" + _small(last, best)
    if last.equal and best.equal:
        real = " (a difference is real, and too small to matter)" if last.different or best.different else ""
        return f"equal; the weights of the tokens do it, not the mixing{real}"
    if last.higher and best.higher:
        return "higher, which the plan did not foresee: the mixing itself costs something" + _small(last, best)
    return f"undecided: at last {last.result}; at best {best.result}"
