"""A tested difference between two arms: when it is called different, equal, or undecided, and in which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sftmix.tools.compare.statistics import ALPHA, holm

SMALL = "real, too small to matter"


@dataclass(frozen=True)
class Contrast:
    """A - B over the seeds, in the unit of its figure.

    mean      mean difference
    interval  95%; None for one seed, or where the runs are not all there
    p_holm    p after Holm's correction; None where nothing is tested
    margin    a difference whose interval lies inside +-margin is called equal
    """

    mean: float
    interval: Sequence[float] | None
    p_holm: float | None
    margin: float

    @property
    def different(self) -> bool:
        return self.p_holm is not None and self.p_holm <= ALPHA

    @property
    def direction(self) -> str:
        return "lower" if self.mean < 0 else "higher"

    @property
    def equal(self) -> bool:
        return self.interval is not None and -self.margin < self.interval[0] and self.interval[1] < self.margin

    @property
    def small(self) -> bool:
        """True for a difference that is real, and too small to matter."""
        return self.different and self.equal

    @property
    def result(self) -> str:
        """The result in words."""
        if self.interval is None:
            return "unfinished" if self.p_holm is None else "one seed"
        equal = f"equal within {self.margin}"
        if self.different:
            return f"different: {self.direction}" + (f", and {equal}: {SMALL}" if self.equal else "")
        if self.equal:
            return equal
        return "not tested" if self.p_holm is None else "undecided"


def holm_of_planned(p_values: Sequence[float], planned: int) -> list[float]:
    """Return Holm's p values of the measured ones of so many planned contrasts.

    One without any value counts among the planned ones: it makes the others no more significant.
    """
    return holm([*p_values, *[1.0] * (planned - len(p_values))])[: len(p_values)]


def in_brackets(interval: Sequence[float] | None) -> str:
    """Write the ends of an interval; "-" without one."""
    return "-" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"
