"""The outcomes of rows whose truth is known, in the words of the plan: no sentence says more than its test.

A gap has two parts, and the plan tests neither. One is called lower or higher where its 95% interval leaves out 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence.contrasts import SMALL, Contrast
from benchmarks.evidence.known_tests import FOUND, TO_NTP, TO_RANDOM, contrast_at, found_by

NO_FIGURE = ("not to be told", "no seed has a figure of both arms")
UNDECIDED_PARTS = "which rows do it is undecided: the interval of neither part shows it"


def outcome_rows(tests: Mapping[str, Any], shares: Sequence[int]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (share, figure, outcome, meaning) of the finished tables.

    tests  the content of contrasts.json
    """
    for share in shares:
        if auc := tests["auc"].get(str(share)):
            yield (f"{share}%", "AUC", *of_auc(auc))
        if share:
            ntp, random = (contrast_at(tests, "gap", contrast, share) for contrast in (TO_NTP, TO_RANDOM))
            to_ntp, to_random = (_parts(tests["parts"][contrast].get(str(share))) for contrast in (TO_NTP, TO_RANDOM))
            yield (f"{share}%", "gap to NTP", *of_gap(ntp, random, to_ntp, to_random))
        yield (f"{share}%", "exact match", *of_exact(contrast_at(tests, "exact", TO_NTP, share), share))


def of_auc(auc: Mapping[str, Any]) -> tuple[str, str]:
    """Return the outcome and the meaning of the AUC among deterministic rows."""
    result, ends = found_by(auc), auc["deterministic"]["interval"]
    if result == "undecided":
        return result, "one seed has no interval"
    if result == "found well":
        return result, "a low confidence marks wrong responses; a user may look there first"
    if result == "found":
        return "found, not well", "a wrong response has the lower confidence more often than not; no more is shown"
    if ends[1] < FOUND:
        return result, "confidence tells difficulty here, not truth: wrong responses have the higher one"
    return result, (
        'the plan reads it as "confidence tells difficulty here, not truth"; '
        f"the interval does not show that, as it reaches from {ends[0]:.2f} to {ends[1]:.2f}"
    )


# ---------------------------------------------------------------------------------------------------- gap


@dataclass(frozen=True)
class Parts:
    """The parts of a difference of gaps, A - B: -1 where the interval is below 0, 1 where it is above, else 0."""

    corrupted: int
    clean: int


def _parts(found: Mapping[str, Any] | None) -> Parts:
    return Parts(**{part: _side(each["interval"]) for part, each in found.items()}) if found else Parts(0, 0)


def _side(interval: Sequence[float] | None) -> int:
    return 0 if interval is None else int(interval[0] > 0) - int(interval[1] < 0)


def of_gap(ntp: Contrast | None, random: Contrast | None, to_ntp: Parts, to_random: Parts) -> tuple[str, str]:
    """Return the outcome and the meaning of SFTMix's gap.

    ntp, random        the gap to NTP, and to RandomSplit
    to_ntp, to_random  the parts of each
    """
    if ntp is None:
        return NO_FIGURE
    if ntp.small:
        return f"{ntp.direction}, and equal within {ntp.margin}", SMALL
    if ntp.equal:
        alike = " more than right ones" * (to_ntp.corrupted > 0)  # both are learnt less well
        return "equal", f"at μ = 0.2 it does not keep wrong responses from being learnt{alike}"
    if not ntp.different:
        return "undecided", "neither different from NTP's nor equal to it"
    if ntp.mean < 0:
        return "lower", _of_lower(to_ntp)
    against = "no seed has a figure of it" if random is None else random.result
    return f"higher (to RandomSplit: {against})", _of_higher(random, to_ntp, to_random)


def _of_lower(to_ntp: Parts) -> str:
    said = ["it learns wrong responses better"] * (to_ntp.corrupted < 0)
    if to_ntp.clean > 0:
        said.append("it learns the right responses less well" + "; nothing is said of wrong ones" * (not said))
    return ", and ".join(said) or UNDECIDED_PARTS


def _of_higher(random: Contrast | None, to_ntp: Parts, to_random: Parts) -> str:
    if to_ntp.corrupted <= 0:
        better = "it learns the right responses better; that it resists wrong ones is not shown"
        return better if to_ntp.clean < 0 else UNDECIDED_PARTS
    right = {-1: "; it learns right ones better, too", 0: "", 1: "; it learns right ones less well, too"}
    return _of_confidence(random, to_random) + right[to_ntp.clean]


def _of_confidence(random: Contrast | None, to_random: Parts) -> str:
    """Return the meaning of a gap that is higher than NTP's because wrong responses are learnt less well."""
    if random is None or not (random.different or random.equal):
        return "SFTMix resists wrong responses; whether confidence is why is undecided"
    if random.equal:
        small = f" (a difference to RandomSplit is {SMALL})" * random.small
        return f"any Mixup of this size does it; confidence has no part above {random.margin} nat{small}"
    if random.mean < 0:
        return "SFTMix resists wrong responses, and RandomSplit more, which the plan did not foresee"
    if to_random.corrupted > 0:
        return "SFTMix resists wrong responses, and confidence is why"
    return "SFTMix resists wrong responses; that confidence is why is not shown, as RandomSplit may resist them as well"


# ------------------------------------------------------------------------------------------------ exact match


def of_exact(ntp: Contrast | None, share: int) -> tuple[str, str]:
    """Return the outcome and the meaning of SFTMix's held-out exact match, compared with NTP's, at a share."""
    if ntp is None:
        return NO_FIGURE
    if ntp.small:
        return f"{ntp.direction} than NTP's, and equal within {ntp.margin}", SMALL
    if ntp.equal:
        return "equal to NTP's", f"it neither helps nor costs answers by {ntp.margin} or more"
    if not ntp.different:
        return "undecided", "neither different from NTP's nor equal to it"
    if ntp.mean < 0:
        return "lower than NTP's", "mixing costs answers"
    return "higher than NTP's", "it helps held-out answers" + " where rows are wrong" * bool(share)
