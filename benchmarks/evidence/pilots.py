"""The pilots: what each value gave, and which one the rule of the preregistration chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from performance_tables import table as grid

from benchmarks.evidence.findings import LAST
from benchmarks.evidence.tiers import Tier
from sftmix.tools.compare.statistics import mean_sd

WORDS = {"pilot-rate": "The learning rate, on NTP alone", "pilot-strength": "μ, and the strength of label smoothing"}

Values = Mapping[int, float]


def pilot_lines(pilot: Tier) -> Iterator[str]:
    """Yield the table of a pilot, and the value it chooses once it is finished."""
    yield from (f"### {WORDS[pilot.name]}", "")
    if not pilot.runs_done:
        yield from ("No run of it has been collected yet.", "")
        return
    found = {arm: {s: LAST.figure(run) for s, run in pilot.runs[arm].items()} for arm in pilot.arms}
    rows = [(arm, *(_number(values.get(s)) for s in pilot.seeds), _mean(values)) for arm, values in found.items()]
    yield from grid(("value", *(f"seed {seed}" for seed in pilot.seeds), "mean"), rows)
    if not pilot.complete:
        yield f"Unfinished: {pilot.runs_done} of {pilot.runs_planned} runs. It chooses nothing yet."
    elif pilot.name == "pilot-rate":
        yield _lowest(found)
    else:
        groups = {arm.rpartition("-")[0]: None for arm in pilot.arms}
        for group in groups:
            yield _middle_unless_lower({arm: found[arm] for arm in pilot.arms if arm.rpartition("-")[0] == group})
    yield ""


def _lowest(found: Mapping[str, Values | dict]) -> str:
    """Return the value of the lowest mean; one at an end of the grid asks for the next value outside."""
    arms = [arm for arm in found if found[arm]]
    chosen = min(arms, key=lambda arm: mean_sd(list(found[arm].values()))[0])
    if chosen in (arms[0], arms[-1]):
        told = f"The lowest mean is that of {chosen}, at an end of the grid"
        return f"{told}: the next value outside (a factor of 2) is added."
    return f"Chosen: {chosen}, the lowest mean."


def _middle_unless_lower(found: Mapping[str, Values | dict]) -> str:
    """Return the middle value, unless another is lower at every seed; of two such, the one with the lower mean."""
    middle = list(found)[len(found) // 2]
    usual = found[middle]
    better = [a for a in found if a != middle and all(found[a].get(s, usual[s]) < usual[s] for s in usual)]
    if not better:
        return f"Chosen: {middle}, the usual one; no other is lower at both seeds."
    chosen = min(better, key=lambda arm: mean_sd(list(found[arm].values()))[0])
    return f"Chosen: {chosen}, lower than {middle} at both seeds."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _mean(values: Values | dict) -> str:
    return _number(mean_sd(list(values.values()))[0]) if values else "-"
