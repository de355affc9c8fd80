"""Print the tables of the study from what was collected: arms, planned contrasts, differences. Nothing is trained.

    python benchmarks/evidence/results.py
    python benchmarks/evidence/results.py --results runs/results --tables primary overfit real-main

The record of the study, benchmarks/results/evidence/README.md, has them as they came out; a test compares them. Tables
of real models also show the secondary endpoints of their plan.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.findings import BEST, LAST, Finding, findings  # noqa: E402
from benchmarks.evidence.tiers import PILOTS, REAL, RESULTS, TITLES, Tier, read_tier  # noqa: E402
from sftmix.tools.compare.statistics import mean_sd  # noqa: E402

ENDPOINTS = {LAST: "after the last step", BEST: "at the best epoch"}
CALIBRATION = {
    "nll_temperature_scaled": "NLL after temperature scaling",
    "temperature": "temperature",
    "ece": "ECE",
    "brier": "Brier",
}
ANSWERS = {"ended": "turns ended", "words_to_reference": "words / reference's", "medmcqa": "MedMCQA"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the collected results")
    parser.add_argument("--tables", nargs="+", choices=(*PILOTS, *TITLES, *REAL), default=(*PILOTS, *TITLES))
    options = parser.parse_args()
    for name in options.tables:
        print("\n".join(lines(read_tier(name, options.results))))


def lines(tier: Tier) -> Iterator[str]:
    """Yield a tier in Markdown: its arms, and at both endpoints its planned contrasts and the arms beside NTP."""
    diverged = "".join(f"; {arm} diverged at {seeds}" for arm, seeds in tier.diverged.items())
    yield from (f"## {tier.title}", "", f"{tier.runs_done} of {tier.runs_planned} runs{diverged}", "")
    yield from _table(("arm", "seeds", *ENDPOINTS.values()), (_arm(tier, arm) for arm in tier.arms if tier.runs[arm]))
    others = [(arm, tier.baseline) for arm in tier.arms if (arm, tier.baseline) not in tier.contrasts]
    for end, words in ENDPOINTS.items():
        planned = findings(tier, end, tier.contrasts, tested=tier.tested)
        beside = findings(tier, end, [pair for pair in others if pair[0] != pair[1]], tested=False)
        yield from (f"### {words.capitalize()}", "")
        head = ("planned contrast", "result", "mean ± sd", "95% interval", "interval over", "seeds", "p", "p (Holm)")
        yield from _table(head, ((_name(f), f.result, *_figures(f), _p(f.p), _p(f.p_holm)) for f in planned))
        yield from _table(("not tested", *head[2:6]), ((_name(f), *_figures(f)) for f in beside))
    if tier.name in REAL:
        measures = ("arm, means over seeds", *CALIBRATION.values(), *ANSWERS.values())
        yield from _table(measures, (_secondary(tier, arm) for arm in tier.arms if tier.runs[arm]))


def _arm(tier: Tier, arm: str) -> Sequence[str]:
    values = [list(tier.values(arm, end).values()) for end in ENDPOINTS]
    means = [_spread(*mean_sd(each), "") if each else "-" for each in values]
    return (arm, str(len(values[0])), *means)


def _secondary(tier: Tier, arm: str) -> Sequence[str]:
    """Return calibration and answers of an arm; "-" for a figure that not all of its seeds have."""
    runs = [tier.runs[arm][seed] for seed in tier.values(arm, LAST)]
    calibration = [[run["calibration"][key] for run in runs] for key in CALIBRATION]
    answers = [[run[key] for run in runs] if all(key in run for run in runs) else [] for key in ANSWERS]
    return (arm, *(f"{mean(values):.4f}" if values else "-" for values in (*calibration, *answers)))


def _name(finding: Finding) -> str:
    return " − ".join(finding.pair)


def _figures(finding: Finding) -> Sequence[str]:
    interval = "-" if finding.interval is None else "[{:+.4f}, {:+.4f}]".format(*finding.interval)
    mean = _spread(finding.mean, finding.sd, "+")
    return (mean, interval, finding.over or "-", str(len(finding.differences)))


def _spread(mean: float, sd: float | None, sign: str) -> str:
    return f"{mean:{sign}.4f}" + ("" if sd is None else f" ± {sd:.4f}")


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    cells = list(rows)
    if cells:
        yield from (f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))
        yield ""


if __name__ == "__main__":
    main()
