"""Draw the results of the study anew: the made parts of docs/results.md, and its pictures. Nothing is trained.

    python benchmarks/evidence/results.py

It reads what benchmarks/evidence/collect.py kept in benchmarks/results/evidence, and the plans of the tables beside
this file. The text of the page between two marks, `<!-- made: NAME -->` and `<!-- end: NAME -->`, is replaced; what
stands outside of them is written by hand. A test compares page and pictures with what this makes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from performance_tables import table as grid  # noqa: E402

from benchmarks.evidence.by_example import example_lines  # noqa: E402
from benchmarks.evidence.findings import (  # noqa: E402
    BEST,
    ENDPOINTS,
    LAST,
    Endpoint,
    Finding,
    described,
    findings,
    in_brackets,
    meanings,
    simpler,
)
from benchmarks.evidence.forest import forest  # noqa: E402
from benchmarks.evidence.known_lines import known_lines, known_pictures  # noqa: E402
from benchmarks.evidence.pilots import pilot_lines  # noqa: E402
from benchmarks.evidence.predictions import outcomes  # noqa: E402
from benchmarks.evidence.secondary import absolute_rows, paired_rows  # noqa: E402
from benchmarks.evidence.tiers import PILOTS, RESULTS, TITLES, Tier, read_tier  # noqa: E402
from sftmix.compare.statistics import mean_sd, smallest_effect  # noqa: E402

PAGE = ROOT / "docs" / "results.md"
PICTURES = ROOT / "docs" / "images" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the collected results")
    options = parser.parse_args()
    tiers = {name: read_tier(name, options.results) for name in TITLES}
    pilots = {name: read_tier(name, options.results) for name in PILOTS}
    parts = parts_of(tiers, pilots, options.results / "known-truth")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), parts), encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    made = {**pictures(tiers), **known_pictures(options.results / "known-truth")}
    for old in set(PICTURES.glob("*.svg")) - {PICTURES / name for name in made}:
        old.unlink()
    for name, picture in made.items():
        (PICTURES / name).write_text(picture, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}, {len(made)} pictures in {PICTURES.relative_to(ROOT)}")


def filled(page: str, parts: Mapping[str, str]) -> str:
    """Return the page with the text between the marks of each part replaced. Raises ValueError for a missing mark."""
    for name, text in parts.items():
        begin, end = f"<!-- made: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        if not pattern.search(page):
            raise ValueError(f"{PAGE.name} has no {begin} ... {end}; put both marks where the part belongs")
        between = f"{begin}\n\n{text.strip()}\n\n{end}"  # blank lines, or a table is no table on the site
        page = pattern.sub(lambda found, between=between: between, page)  # type: ignore[misc]
    return page


def parts_of(tiers: Mapping[str, Tier], pilots: Mapping[str, Tier], known: Path) -> dict[str, str]:
    """Return the made parts of the page by name.

    known  folder of the results of rows whose truth is known, which may not be there
    """
    begun = [tier for tier in tiers.values() if tier.runs_done]
    tables = [line for tier in begun for line in _tier_lines(tier)]
    return {
        "state": "\n".join(_state(tiers)),
        "tiers": "\n".join(tables) or "No run of a tier has been collected yet.",
        "predictions": "\n".join(_predictions(tiers)),
        "by example": "\n".join(example_lines(tiers, known.parent)),  # known.parent holds all results
        "known truth": "\n".join(known_lines(known)),
        "pilots": "\n".join(line for pilot in pilots.values() for line in pilot_lines(pilot)),
    }


# --------------------------------------------------------------------------------------------- the parts


def _state(tiers: Mapping[str, Tier]) -> Iterator[str]:
    done = [tier.title.split(":")[0].lower() for tier in tiers.values() if tier.complete]
    yield (
        f"Finished: {', '.join(done)}."
        if done
        else "**No tier of the study is finished, so nothing is found on natural text yet.**"
    )
    yield ""
    for tier in tiers.values():
        if tier.tested and tier.complete:
            caveat = " Read it with care: this regime did not overfit." if _fits_still(tier) else ""
            yield from (f"- {tier.title.split(':')[0]}. {meaning}{caveat}" for meaning in meanings(tier))
    for name, arm, words in _SIMPLER:
        if name in tiers and tiers[name].complete:
            yield f"- {simpler(tiers[name], arm, words)}"
    yield ""
    rows = [
        (
            tier.title,
            f"`{tier.name}`",
            f"{len(tier.arms)} arms, {len(tier.seeds)} seeds",
            f"{tier.runs_done} of {tier.runs_planned}",
            _seeds(tier.common),
            _diverged(tier),
        )
        for tier in tiers.values()
    ]
    yield from grid(("tier", "table", "planned", "runs done", "seeds that all arms have", "diverged"), rows)


_SIMPLER = (
    ("primary", "LabelSmoothing", "Label smoothing"),
    ("parts", "single-run", "SFTMix without a reference (single run)"),
)
"""Arms of which the plan asks to be told where they do as well as the recipe."""


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"


def _diverged(tier: Tier) -> str:
    return "; ".join(f"{arm} at {_seeds(seeds)}" for arm, seeds in tier.diverged.items()) or "none"


def _tier_lines(tier: Tier) -> Iterator[str]:
    yield from (f"### {tier.title}", "")
    if not tier.complete:
        yield f"**Unfinished: {tier.runs_done} of {tier.runs_planned} runs.** There is no test and no interval yet."
        yield f"The figures are of the seeds that all arms have: {_seeds(tier.common)}."
        yield ""
        if not tier.common:
            return
    yield from grid(("arm", "seeds", *(f"{end.name}, mean ± sd" for end in ENDPOINTS)), list(_arm_rows(tier)))
    yield from (_made_by(tier), "")
    if tier.name == "overfit" and tier.complete:
        yield from _overfits(tier)
    for end in ENDPOINTS:
        yield from _contrast_lines(tier, end)
    yield from ("#### Secondary endpoints", "", "Mean ± standard deviation over the seeds.", "")
    yield from grid(("figure", *tier.arms), list(absolute_rows(tier)))
    others = [arm for arm in tier.arms if arm != tier.baseline]
    yield f"Minus {tier.baseline}, paired by seed (a spread: over {tier.baseline}'s, minus 1); not tested."
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


def _overfits(tier: Tier) -> Iterator[str]:
    yield f"NTP ends {_risen(tier):.4f} nat above its best evaluation" + (
        ": less than 0.05, so this regime did not overfit, and the table answers question 2 no more than tier 1."
        if _fits_still(tier)
        else "; the regime overfits (0.05 or more was asked for)."
    )
    yield ""


def _fits_still(tier: Tier) -> bool:
    """Return True for a tier that was to overfit and did not, by the rule of the preregistration."""
    return tier.name == "overfit" and _risen(tier) < 0.05


def _risen(tier: Tier) -> float:
    """Return how far NTP's last evaluation is above its best one, nats per token; 0 without a run of it."""
    ends = [list(tier.values("NTP", end.figure).values()) for end in (LAST, BEST)]
    last, best = (mean_sd(values)[0] if values else 0.0 for values in ends)
    return last - best


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
    yield f"![{tier.title}, {end.words}: paired differences with intervals](images/results/{_picture(tier, end)})"
    yield ""
    yield from grid(("planned contrast", "seeds", *_COLUMNS, *_TESTS), [_tested(f, tier) for f in planned])
    if others:
        yield "Not planned as contrasts, and not tested:"
        yield ""
        yield from grid(("difference", "seeds", *_COLUMNS), [_row(found) for found in others])


_TESTS = ("p", "p (Holm)", "detectable", "result")
_COLUMNS = ("mean ± sd", "95% interval", "interval over")


def _found(tier: Tier, end: Endpoint) -> tuple[list[Finding], list[Finding]]:
    planned = findings(tier, end, tier.contrasts, tested=tier.tested)
    return planned, findings(tier, end, described(tier), tested=False)


def _row(found: Finding) -> Sequence[str]:
    mean = f"{found.mean:+.4f}" + ("" if found.sd is None else f" ± {found.sd:.4f}")
    return (found.name, str(len(found.differences)), mean, in_brackets(found.interval), found.over or "-")


def _tested(found: Finding, tier: Tier) -> Sequence[str]:
    if found.p is None or found.sd is None:
        return (*_row(found), "-", "-", "-", found.result)
    effect = smallest_effect(found.sd, len(found.differences), contrasts=len(tier.contrasts))
    detectable = "-" if effect is None else f"{effect:.4f}"
    return (*_row(found), f"{found.p:.4f}", f"{found.p_holm:.4f}", detectable, found.result)


def _predictions(tiers: Mapping[str, Tier]) -> Iterator[str]:
    rows = [(str(each.number), each.predicted, each.came, each.words) for each in outcomes(tiers)]
    yield from grid(("prediction", "what was predicted", "what came", "result"), rows)


# ------------------------------------------------------------------------------------------- the pictures


def pictures(tiers: Mapping[str, Tier]) -> dict[str, str]:
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
    return "" if tier.complete else f" (unfinished: seeds {_seeds(tier.common)})"


if __name__ == "__main__":
    main()
