"""The contrasts of a tier by the rules of the preregistration: interval, test, result, and what the result means."""

from __future__ import annotations

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
            return "unfinished" if self.p is None else "one seed"
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
    for subject, others, told in (
        ("SFTMix to NTP", ("NTP",), _to_ntp),
        ("The split", ("RandomSplit", "LengthMatched"), _of_the_split),
        ("SFTMix to DecomposedMixup", ("DecomposedMixup",), _of_the_mixing),
    ):
        lacking = [other for other in others if other not in both]
        if lacking:
            yield f"{subject}: not to be told, as no seed has a figure of SFTMix and of {lacking[0]}."
        else:
            own = {other: both[other] for other in others}
            yield f"{subject}: {told(own)}{_fewer_seeds(tier, own)}."


def _fewer_seeds(tier: Tier, both: Both) -> str:
    """Return how many seeds a meaning rests on, where runs diverged."""
    least = min(len(end.differences) for ends in both.values() for end in ends)
    return f" (over {least} of {len(tier.seeds)} seeds: runs at the others diverged)" if least < len(tier.seeds) else ""


def _to_ntp(both: Both) -> str:
    last, best = both["NTP"]
    if last.equal and best.equal:
        return f"equal at both{_real(last, best)}; it does nothing that matters here, and costs a reference"
    if last.lower and best.lower:
        return "a gain: lower at last and best; it helps at this size"
    said = []
    if last.lower:
        stopping = "stopping NTP earlier gives as much" if best.equal or best.higher else "best is undecided"
        said.append(f"lower at last{_small(last)}, not at best: it regularises, and {stopping}")
    if best.lower:
        said.append(f"lower at best alone{_small(best)}: a difference at one endpoint is no gain")
    for end, name in ((last, "last"), (best, "best")):
        if end.higher:
            said.append(f"higher at {name}{_small(end)}: it hurts there")
    return "; ".join(said) or f"undecided: {_each(both)}"


def _of_the_split(both: Both) -> str:
    """Return the result of SFTMix against the two splits that know no confidence, each at both endpoints."""
    ends = [end for own in both.values() for end in own]
    if all(end.equal for end in ends):
        return f"equal to both controls{_real(*ends)}; the confidence of the split has no part in the result"
    if all(end.lower for end in ends):
        return "lower than both controls; it has a part: confidence, or the lengths that go with it"
    if all(end.higher for end in ends):
        return "higher than both controls, which the plan did not foresee: random halves do better here"
    return f"undecided, as not all are alike: {_each(both)}"


def _of_the_mixing(both: Both) -> str:
    last, best = both["DecomposedMixup"]
    if last.equal and best.equal:
        return f"equal{_real(last, best)}; the weights of the tokens do it, not the mixing"
    if last.lower and best.lower:
        return "lower; mixing itself adds something"
    if last.higher and best.higher:
        return "higher, which the plan did not foresee: the mixing itself costs something"
    return f"undecided, as both are not alike: {_each(both)}"


def _small(end: Finding) -> str:
    return " (within 0.01 nat: real, too small to matter)" if end.equal else ""


def _real(*ends: Finding) -> str:
    """Return that differences inside the margin are real, where some are."""
    real = sorted({f"{'lower' if end.lower else 'higher'}" for end in ends if end.different})
    return f" (also different, {' and '.join(real)}: real, too small to matter)" if real else ""


def _each(both: Both) -> str:
    """Return the result of every contrast at every endpoint."""
    ends = [(other, *pair) for other, pair in both.items()]
    return "; ".join(f"to {other} at last {last.result}, at best {best.result}" for other, last, best in ends)


def simpler(tier: Tier, arm: str, words: str) -> str:
    """Return whether an arm that needs no reference is within 0.01 nat of SFTMix or below it; no test is made."""
    off = {end.name: tier.differences((arm, "SFTMix"), end.figure).values() for end in ENDPOINTS}
    means = {name: mean_sd(list(values))[0] for name, values in off.items() if values}
    if not means:
        return f"{words}: no seed has a figure of it and of SFTMix."
    near = "is" if all(mean <= MARGIN for mean in means.values()) else "is not"
    told = ", ".join(f"{mean:+.4f} at {name}" for name, mean in means.items())
    return f"{words} {near} within {MARGIN} nat of SFTMix or below it ({told}; not tested)."
