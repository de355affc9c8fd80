"""Ask of which examples the difference between two arms is: the unconfident ones, the short ones, those of a topic?

    python benchmarks/evidence/by_example.py
    python benchmarks/evidence/by_example.py --tables primary --pair SFTMix NTP --out differences.json

It is exploratory: no plan named these tests. It reads the losses of single examples that collect.py kept of finished
tables, on the held-out rows and on the sample of training rows that every run measures, and asks two things of each
group of rows (groups.py): how large the difference between the arms is in the group, and how much larger or smaller it
is there than in all other rows. Only the second tells where a difference is, and only the second is tested.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from performance_tables import folded  # noqa: E402
from performance_tables import table as grid  # noqa: E402

from benchmarks.evidence.contrasts import in_brackets  # noqa: E402
from benchmarks.evidence.groups import Found, found_in, left_out, tested  # noqa: E402
from benchmarks.evidence.losses import read_losses  # noqa: E402
from benchmarks.evidence.tiers import PILOTS, RESULTS, TESTED, TITLES, Pair, Tier, read_tier  # noqa: E402
from sftmix.common.files import write_json  # noqa: E402
from sftmix.tools.compare.statistics import ALPHA, smallest_p  # noqa: E402

PAIRS: tuple[Pair, ...] = (("SFTMix", "NTP"), ("SFTMix", "RandomSplit"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=(*TITLES, *PILOTS), default=TESTED, help="kept tables")
    parser.add_argument("--pair", nargs=2, action="append", metavar=("A", "B"), help="arms of A - B; may be repeated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the collected results")
    parser.add_argument("--out", type=Path, help="JSON file of what is found")
    options = parser.parse_args()
    tiers = {name: read_tier(name, options.results) for name in options.tables}
    pairs = [(a, b) for a, b in options.pair] if options.pair else PAIRS
    found, notes = by_example(tiers, options.results, pairs)
    if options.out:
        write_json(options.out, {"exploratory": True, "notes": notes, "groups": [asdict(each) for each in found]})
    print("\n".join(_lines(found, notes)))


def by_example(
    tiers: Mapping[str, Tier], results: Path, pairs: Sequence[Pair] = PAIRS
) -> tuple[list[Found], list[str]]:
    """Return the groups of each finished table and pair with their tests, and sentences on what is not told.

    results  folder of the collected results; a table's losses lie in NAME/losses
    """
    found: list[Found] = []
    notes = []
    for name, tier in tiers.items():
        losses = read_losses(results / name / "losses")
        if not tier.complete:
            notes.append(f"`{name}` is unfinished ({tier.runs_done} of {tier.runs_planned} runs).")
        elif losses is None:
            notes.append(f"`{name}` has no kept losses of single examples.")
        else:
            for pair in pairs:
                notes += left_out(tier, losses, pair)
                found += found_in(tier, losses, pair)
    return tested(found), notes


def example_lines(tiers: Mapping[str, Tier], results: Path) -> Iterator[str]:
    """Yield the made part of the page, of the tiers with tests."""
    yield from _lines(*by_example({name: tiers[name] for name in TESTED}, results))


# --------------------------------------------------------------------------------------------- the lines


def _lines(found: Sequence[Found], notes: Sequence[str]) -> Iterator[str]:
    if not found:
        yield "**Exploratory**, and nothing to tell yet: " + "; ".join(note.rstrip(".") for note in notes) + "."
        return
    yield "**Exploratory: no plan named these tests, so nothing here is a result of the study.**"
    yield "Lengths of the held-out rows and halves of the sample are secondary endpoints, planned to be described."
    yield from _power(found)
    yield ""
    yield from _came(found)
    yield ""
    for note in notes:
        yield from (note, "")
    for table, pair in dict.fromkeys((each.table, each.pair) for each in found):
        own = [each for each in found if (each.table, each.pair) == (table, pair)]
        title = f"{TITLES.get(table, table)}, {_name(pair)}: all {len(own)} groups, {len(own[0].inside)} seeds"
        yield from folded(title, grid(_HEAD, [_row(each) for each in own]))


def _power(found: Sequence[Found]) -> Iterator[str]:
    """Yield how often was looked, and what the seeds can show at best."""
    asked = sum(each.p is not None for each in found)
    seeds = max(len(each.inside) for each in found)
    least = smallest_p(seeds)
    yield f"{asked} questions are asked. The smallest p that {seeds} seeds can give is {least:.4f}."
    holm = min(1.0, asked * least)
    can = "could pass" if holm <= ALPHA else "nothing could pass, whatever the losses are"
    yield f"After Holm's correction over all questions it is {holm:.4f}: {can}."
    can = "a group could pass" if least <= ALPHA else "nothing could pass"
    yield f"After the correction by the largest of all groups (Westfall and Young, 1993) it is {least:.4f}: {can}."
    yield "The held-out rows and the sampled training rows are fixed, and the tests are over the seeds alone."


def _came(found: Sequence[Found]) -> Iterator[str]:
    passed = [each for each in found if each.p_largest is not None and each.p_largest <= ALPHA]
    if not passed:
        yield "In no group is the difference shown to be another one than in the other rows."
        return
    rows = []
    for where in dict.fromkeys((each.table, each.pair, each.rows) for each in found):
        own = [each for each in passed if (each.table, each.pair, each.rows) == where]
        own.sort(key=lambda each: each.mean_beyond)
        table, pair, kind = where
        lower, higher = (_groups([each for each in own if (each.mean_beyond < 0) is below]) for below in (True, False))
        rows.append((f"`{table}`", _name(pair), kind, lower, higher))
    yield "Groups in which the difference is another one than in the other rows, and by how much:"
    yield ""
    yield from grid(("table", "difference", "rows", "lower", "higher"), rows)


def _groups(found: Sequence[Found]) -> str:
    return "<br>".join(f"{each.group}: {each.mean_beyond:+.4f}" for each in found) or "none shown"


_HEAD = (
    "rows",
    "group",
    "examples",
    "difference",
    "95% interval over seeds and examples",
    "beyond the other rows",
    "95% interval over seeds",
    "p",
    "p (Holm)",
    "p (largest)",
)


def _row(each: Found) -> Sequence[str]:
    p_values = ("-" if p is None else f"{p:.4f}" for p in (each.p, each.p_holm, each.p_largest))
    over = " over seeds" if each.examples == 1 else ""
    inside = (f"{each.mean_inside:+.4f}", in_brackets(each.interval_inside) + over)
    beyond = (f"{each.mean_beyond:+.4f}", in_brackets(each.interval_beyond))
    return (each.rows, each.group, str(each.examples), *inside, *beyond, *p_values)


def _name(pair: Pair) -> str:
    return f"{pair[0]} − {pair[1]}"


if __name__ == "__main__":
    main()
