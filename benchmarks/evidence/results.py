"""Draw the record of the study anew: the made parts of its page, and its pictures. Nothing is trained.

    python benchmarks/evidence/results.py

It reads what benchmarks/evidence/collect.py kept in benchmarks/results/evidence, and the plans of the tables beside
this file. The text of the page between two marks, `<!-- made: NAME -->` and `<!-- end: NAME -->`, is replaced; what
stands outside of them is written by hand. A test compares page and pictures with what this makes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from performance_tables import table as grid  # noqa: E402

from benchmarks.evidence.by_example import example_lines  # noqa: E402
from benchmarks.evidence.known_lines import known_lines, known_pictures  # noqa: E402
from benchmarks.evidence.pilots import pilot_lines  # noqa: E402
from benchmarks.evidence.predictions import outcomes  # noqa: E402
from benchmarks.evidence.tier_lines import tier_lines, tier_pictures  # noqa: E402
from benchmarks.evidence.tiers import PILOTS, RESULTS, TITLES, Tier, listed, read_tier  # noqa: E402

PAGE = RESULTS / "README.md"
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
    made = {**tier_pictures(tiers), **known_pictures(options.results / "known-truth")}
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
    tables = [line for tier in begun for line in tier_lines(tier)]
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
    rows = [
        (
            tier.title,
            f"`{tier.name}`",
            f"{len(tier.arms)} arms, {len(tier.seeds)} seeds",
            f"{tier.runs_done} of {tier.runs_planned}",
            listed(tier.common),
            _diverged(tier),
        )
        for tier in tiers.values()
    ]
    yield from grid(("tier", "table", "planned", "runs done", "seeds that all arms have", "diverged"), rows)


def _diverged(tier: Tier) -> str:
    return "; ".join(f"{arm} at {listed(seeds)}" for arm, seeds in tier.diverged.items()) or "none"


def _predictions(tiers: Mapping[str, Tier]) -> Iterator[str]:
    rows = [(str(each.number), each.predicted, each.came, each.words) for each in outcomes(tiers)]
    yield from grid(("prediction", "what was predicted", "what came", "result"), rows)


if __name__ == "__main__":
    main()
