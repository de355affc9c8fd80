"""The predictions of the preregistration, each as ranges of figures, next to what came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.evidence.contrasts import in_brackets
from benchmarks.evidence.findings import BEST, ENDPOINTS, LAST, Endpoint, findings
from benchmarks.evidence.secondary import LOG_SPREAD, TEMPERATURE, relative
from benchmarks.evidence.tiers import Figure, Tier
from sftmix.tools.compare.statistics import mean_sd

Tiers = Mapping[str, Tier]


@dataclass(frozen=True)
class Outcome:
    """A part of a prediction: its number there, what was predicted of what, and what came; `held` None: not known."""

    number: int
    predicted: str
    came: str = "-"
    held: bool | None = None

    @property
    def words(self) -> str:
        return "not yet" if self.held is None else "as predicted" if self.held else "not as predicted"


def outcomes(tiers: Tiers) -> Iterator[Outcome]:
    """Yield what came of each prediction; one of a tier that is not finished stays open."""
    first, second, third = tiers["primary"], tiers["overfit"], tiers["parts"]
    for end in ENDPOINTS:
        yield _between(1, first, "SFTMix − NTP", end, -0.010, 0)
        yield _equal(1, first, "NTP", end)
    for other in ("RandomSplit", "LengthMatched", "DecomposedMixup"):
        for end in ENDPOINTS:
            yield _equal(2, first, other, end)
    for tier in (first, second):
        for end in ENDPOINTS:
            yield _nearer(tier, end)
    yield _between(4, first, "LabelSmoothing − NTP", LAST, 0, None)
    yield _lower_temperature(first)
    yield _between(5, second, "SFTMix − NTP", LAST, -0.15, -0.05)
    yield _between(5, second, "SFTMix − RandomSplit", LAST, -0.01, 0.01)
    yield _between(5, second, "SFTMix − DecomposedMixup", LAST, -0.03, -0.01)
    yield _between(6, second, "SFTMix − NTP", BEST, 0.02, 0.06)
    yield _spread(second, None, 0.0, "below NTP's")
    yield _spread(first, -0.03, 0.03, "within 3% of NTP's")
    for end in ENDPOINTS:
        for arm in ("single-run", "weaker-reference"):
            yield _between(8, third, f"{arm} − SFTMix", end, -0.01, 0.01)
        yield _between(8, third, "MixupOnly − NTP", end, 0.02, None)


def _mean(tier: Tier, name: str, figure: Figure) -> float | None:
    """Return the mean of a paired difference `A − B`; None while the tier is unfinished."""
    ours, theirs = name.split(" − ")
    found = list(tier.differences((ours, theirs), figure).values())
    return mean_sd(found)[0] if tier.complete and found else None


def _place(tier: Tier, end: Endpoint) -> str:
    return f"{tier.title.split(':')[0].lower()}, {end.name}"


def _between(number: int, tier: Tier, name: str, end: Endpoint, low: float | None, high: float | None) -> Outcome:
    mean = _mean(tier, name, end.figure)
    words = f"above {low}" if high is None else f"below {high}" if low is None else f"{low} to {high}"
    predicted = f"{_place(tier, end)}: {name}, {words}"
    if mean is None:
        return Outcome(number, predicted)
    return Outcome(number, predicted, f"{mean:+.4f}", (low is None or mean >= low) and (high is None or mean <= high))


def _equal(number: int, tier: Tier, other: str, end: Endpoint) -> Outcome:
    predicted = f"{_place(tier, end)}: SFTMix and {other} equal"
    found = findings(tier, end, [("SFTMix", other)], tested=False)
    if not (tier.complete and found and found[0].interval):
        return Outcome(number, predicted)
    return Outcome(number, predicted, in_brackets(found[0].interval), found[0].equal)


def _nearer(tier: Tier, end: Endpoint) -> Outcome:
    predicted = f"{_place(tier, end)}: SFTMix-ntp nearer to NTP than SFTMix is"
    lighter, full = (_mean(tier, f"{arm} − NTP", end.figure) for arm in ("SFTMix-ntp", "SFTMix"))
    if lighter is None or full is None:
        return Outcome(3, predicted)
    return Outcome(3, predicted, f"{lighter:+.4f} beside {full:+.4f}", abs(lighter) < abs(full))


def _lower_temperature(tier: Tier) -> Outcome:
    mean = _mean(tier, "LabelSmoothing − NTP", TEMPERATURE)
    predicted = "tier 1: temperature of LabelSmoothing lower than NTP's"
    return Outcome(4, predicted) if mean is None else Outcome(4, predicted, f"{mean:+.4f}", mean < 0)


def _spread(tier: Tier, low: float | None, high: float, words: str) -> Outcome:
    predicted = f"{tier.title.split(':')[0].lower()}: spread of SFTMix's log confidence {words}"
    ratios = relative(tier, "SFTMix", LOG_SPREAD) if tier.complete else []
    if not ratios:
        return Outcome(7, predicted)
    mean = mean_sd(ratios)[0]
    return Outcome(7, predicted, f"{mean:+.1%}", (low is None or mean > low) and mean < high)
