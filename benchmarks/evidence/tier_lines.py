"""The part of the page of results that a tier fills: its tables and its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from performance_tables import folded
from performance_tables import table as grid

from benchmarks.evidence.contrasts import in_brackets
from benchmarks.evidence.findings import ENDPOINTS, LAST, Endpoint, Finding, described, findings
from benchmarks.evidence.forest import forest
from benchmarks.evidence.secondary import absolute_rows, paired_rows
from benchmarks.evidence.tiers import IMAGES, Tier, listed
from sftmix.tools.compare.statistics import mean_sd, smallest_effect


def tier_lines(tier: Tier) -> Iterator[str]:
    """Yield the arms of a tier, its contrasts at both endpoints, and its secondary figures."""
    yield from (f"### {tier.title}", "")
    if not tier.complete:
        yield f"**Unfinished: {tier.runs_done} of {tier.runs_planned} runs.** There is no test and no interval yet."
        yield f"The figures are of the seeds that all arms have: {listed(tier.common)}."
        yield ""
        if not tier.common:
            return
    yield from grid(("arm", "seeds", *(f"{end.name}, mean ± sd" for end in ENDPOINTS)), list(_arm_rows(tier)))
    yield from (_made_by(tier), "")
    for end in ENDPOINTS:
        yield from _contrast_lines(tier, end)
    yield from ("#### Secondary endpoints", "")
    figures = grid(("figure", *tier.arms), list(absolute_rows(tier)))
    yield from folded("The figures themselves, mean ± standard deviation over the seeds", figures)
    others = [arm for arm in tier.arms if arm != tier.baseline]
    base = tier.baseline
    yield f"Minus {base}, paired by seed (a spread: over {base}'s, minus 1), of what differs at all; not tested."
    yield ""
    yield from grid(("figure", *others), list(paired_rows(tier)))


def _arm_rows(tier: Tier) -> Iterator[Sequence[str]]:
    for arm in tier.arms:
        cells = []
        for end in ENDPOINTS:
            values = list(tier.values(arm, end.figure).values())
            mean, sd = mean_sd(values) if values else (None, None)
            cells.append("-" if mean is None else f"{mean:.4f}" + ("" if sd is None else f" ± {sd:.4f}"))
        yield (arm, str(len(tier.values(arm, LAST.figure))), *cells)


def _made_by(tier: Tier) -> str:
    """Return which revision trained the runs, and whether the references made in several sittings were the same."""
    revisions = tier.revisions
    told = f"Trained by revision {revisions[0]}." if len(revisions) == 1 else _several(revisions)
    if tier.name == "rows" or not tier.confidences:  # each seed has rows and a reference of its own
        return told
    n = len(tier.confidences)
    return f"{told} The confidence of SFTMix is {'the same at all seeds, bit for bit' if n == 1 else f'of {n} kinds'}."


def _several(revisions: Sequence[str]) -> str:
    return f"**Trained by {len(revisions)} revisions, where the plan asks for one: {', '.join(revisions)}.**"


def _contrast_lines(tier: Tier, end: Endpoint) -> Iterator[str]:
    planned, others = _found(tier, end)
    yield from (f"#### {end.name.capitalize()}: {end.words}", "")
    yield f"![{tier.title}, {end.words}: paired differences with intervals]({IMAGES}/{_picture(tier, end)})"
    yield ""
    yield from grid(("planned contrast", "result", *_COLUMNS, *_TESTS), [_tested(f, tier) for f in planned])
    if others:
        yield "Not planned as contrasts, and not tested:"
        yield ""
        yield from grid(("difference", *_COLUMNS), [_row(found) for found in others])


_COLUMNS = ("mean ± sd", "95% interval", "interval over", "seeds")
_TESTS = ("p", "p (Holm)", "detectable")


def _found(tier: Tier, end: Endpoint) -> tuple[list[Finding], list[Finding]]:
    planned = findings(tier, end, tier.contrasts, tested=tier.tested)
    return planned, findings(tier, end, described(tier), tested=False)


def _row(found: Finding) -> Sequence[str]:
    mean = f"{found.mean:+.4f}" + ("" if found.sd is None else f" ± {found.sd:.4f}")
    return (found.name, mean, in_brackets(found.interval), found.over or "-", str(len(found.differences)))


def _tested(found: Finding, tier: Tier) -> Sequence[str]:
    name, *figures = _row(found)
    if found.p is None or found.sd is None:
        return (name, found.result, *figures, "-", "-", "-")
    effect = smallest_effect(found.sd, len(found.differences), contrasts=len(tier.contrasts))
    detectable = "-" if effect is None else f"{effect:.4f}"
    return (name, found.result, *figures, f"{found.p:.4f}", f"{found.p_holm:.4f}", detectable)


# ------------------------------------------------------------------------------------------- the pictures


def tier_pictures(tiers: Mapping[str, Tier]) -> dict[str, str]:
    """Return file name -> SVG text of each tier and endpoint, of finished tiers and those with a seed in all arms."""
    return {
        _picture(tier, end): forest(f"{tier.title}, {end.words}{_unfinished(tier)}", *_found(tier, end))
        for tier in tiers.values()
        if tier.common or tier.complete
        for end in ENDPOINTS
    }


def _picture(tier: Tier, end: Endpoint) -> str:
    return f"{tier.name}-{end.name}.svg"


def _unfinished(tier: Tier) -> str:
    return "" if tier.complete else f" (unfinished: seeds {listed(tier.common)})"
