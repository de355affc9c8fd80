"""What the planned contrasts of a finished tier mean, in the words of the preregistration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from benchmarks.evidence.contrasts import SMALL
from benchmarks.evidence.findings import BEST, ENDPOINTS, LAST, MARGIN, Finding, findings
from benchmarks.evidence.tiers import Tier
from sftmix.tools.compare.statistics import mean_sd

OVERFITS = 0.05
"""Nats per token by which NTP's last evaluation is above its best one in a regime that overfits."""
Both = Mapping[str, tuple[Finding, Finding]]
"""Other arm -> SFTMix minus it, at last and at best."""


def meanings(tier: Tier) -> Iterator[str]:
    """Yield what the planned contrasts of a finished, tested tier mean, in the words of the preregistration."""
    ends = [findings(tier, endpoint, tier.contrasts, tested=True) for endpoint in ENDPOINTS]
    both = {last.pair[1]: (last, best) for last in ends[0] for best in ends[1] if best.pair == last.pair}
    for subject, others, told in (
        ("SFTMix to NTP", ("NTP",), _to_ntp),
        ("The split", ("RandomSplit", "LengthMatched"), _of_the_split),
        ("SFTMix to DecomposedMixup", ("DecomposedMixup",), partial(_of_the_mixing, to_ntp=both.get("NTP", ()))),
    ):
        lacking = [other for other in others if other not in both]
        if lacking:
            yield f"{subject}: not to be told, as no seed has a figure of SFTMix and of {lacking[0]}."
        else:
            own = {other: both[other] for other in others}
            yield f"{subject}: {told(own)}{_fewer_seeds(tier, own)}."
    if all(tier.values(arm, LAST.figure) == tier.values(arm, BEST.figure) for arm in tier.arms):
        yield "The last evaluation was the best one in all runs: nothing is shown of stopping earlier."


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


def _of_the_mixing(both: Both, to_ntp: Sequence[Finding]) -> str:
    """Return the result of SFTMix against the same weights without mixing, which explain nothing where NTP is equal."""
    last, best = both["DecomposedMixup"]
    if last.equal and best.equal:
        nothing = bool(to_ntp) and all(end.equal for end in to_ntp)
        caveat = " (there is no difference to NTP to explain)" if nothing else ""
        return f"equal{_real(last, best)}; the weights of the tokens do it, not the mixing{caveat}"
    if last.lower and best.lower:
        return "lower; mixing itself adds something"
    if last.higher and best.higher:
        return "higher, which the plan did not foresee: the mixing itself costs something"
    return f"undecided, as both are not alike: {_each(both)}"


def _small(end: Finding) -> str:
    return f" (within {MARGIN} nat: {SMALL})" if end.equal else ""


def _real(*ends: Finding) -> str:
    """Return that differences inside the margin are real, where some are."""
    real = sorted({end.direction for end in ends if end.different})
    return f" (also different, {' and '.join(real)}: {SMALL})" if real else ""


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


# ------------------------------------------------------------------------------ the regime that is to overfit


def fits_still(tier: Tier) -> bool:
    """Return True for a tier that was to overfit and did not, by the rule of the preregistration."""
    return tier.name == "overfit" and risen(tier) < OVERFITS


def risen(tier: Tier) -> float:
    """Return how far NTP's last evaluation is above its best one, nats per token; 0 without a run of it."""
    ends = [list(tier.values("NTP", end.figure).values()) for end in (LAST, BEST)]
    last, best = (mean_sd(values)[0] if values else 0.0 for values in ends)
    return last - best
