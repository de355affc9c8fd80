"""Run tables of the study one after another, each with its seeds divided among several processes.

    python benchmarks/evidence/run.py --tables pilot-rate pilot-strength --jobs 2
    python benchmarks/evidence/run.py --tables primary overfit parts rows others --jobs 2
    python benchmarks/evidence/run.py --tables primary --seeds 4 5 6 --options --model.path DIR

Each table comes in the place that the preregistration names for it, is written for both endpoints, and what is small
of it is kept in benchmarks/results/evidence. The same command continues what was interrupted.

With several jobs the seeds that are missing are dealt to directories beside the table, TABLE.part-1, TABLE.part-2, ...
Each is run by a process of one thread, which trains a reference of its own: the same one, since its seed is the same.
The parts then become one table (join.py). Delete them when the table is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.collect import collect  # noqa: E402
from benchmarks.evidence.join import compare, link_runs  # noqa: E402
from benchmarks.evidence.tiers import FOLDER, PILOTS, RESULTS, TESTED, TITLES, Tier, read_tier  # noqa: E402
from sftmix.common.errors import SFTMixError  # noqa: E402
from sftmix.compare.cells import is_over  # noqa: E402
from sftmix.pipeline.hold import Hold  # noqa: E402

IN_PRIMARY = ("parts", "others")
"""Tables in the directory of tier 1, whose NTP and SFTMix they read back."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", required=True, choices=(*PILOTS, *TITLES), help="in this order")
    parser.add_argument("--seeds", nargs="+", type=int, help="some of the seeds; all of the plan's if left out")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of the tables")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of all results")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the rest goes to compare as it stands")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; allowed: 1 and above")
    try:
        for name in options.tables:
            plan = read_tier(name)
            place = options.runs / ("primary" if name in IN_PRIMARY else name)
            seeds = _seeds(plan, options.seeds)
            run_table(plan, place, seeds, options.jobs, options.options)
            keep(plan, place, seeds, options.out, options.options)
    except SFTMixError as error:
        sys.exit(f"error: {error}")


def _seeds(plan: Tier, chosen: Sequence[int] | None) -> list[int]:
    """Return the seeds of the plan, or those of them that were chosen."""
    others = sorted(set(chosen or ()) - set(plan.seeds))
    if others:
        sys.exit(f"error: --seeds {others[0]} is no seed of {plan.name}; its seeds: {', '.join(map(str, plan.seeds))}")
    return list(chosen or plan.seeds)


def run_table(plan: Tier, place: Path, seeds: Sequence[int], jobs: int, more: Sequence[str]) -> None:
    """Run the missing cells of a table at these seeds; leave the program with the exit code of a part that failed."""
    missing = [seed for seed in seeds if not all(is_over(place / arm / f"seed-{seed}") for arm in plan.arms)]
    dealt = [missing[job::jobs] for job in range(min(jobs, len(missing)))]
    if len(dealt) > 1:
        parts = [place.with_name(f"{place.name}.part-{job}") for job in range(1, len(dealt) + 1)]
        _side_by_side(plan, place, dict(zip(parts, dealt, strict=True)), more)
        with Hold(place):
            for part, own in zip(parts, dealt, strict=True):
                link_runs(part, place, plan.arms, own)
    _succeed(compare(*_words(plan, place, seeds, more)))


def _side_by_side(plan: Tier, place: Path, parts: dict[Path, list[int]], more: Sequence[str]) -> None:
    """Run the parts at once, each from the runs that the table has already, and wait for all of them."""
    started = []
    place.parent.mkdir(parents=True, exist_ok=True)
    for part, own in parts.items():
        if place.is_dir():
            link_runs(place, part, plan.arms, own)
        command = [sys.executable, "-m", "sftmix", "compare", *map(str, _words(plan, part, own, more))]
        with part.with_name(f"{part.name}.log").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        print(f"{part}: seeds {', '.join(map(str, own))}; its output is in {part.name}.log", flush=True)
    codes = [process.wait() for process in started]
    for part, code in zip(parts, codes, strict=True):
        if code:
            print(f"{part}: exit code {code}; see {part.name}.log", file=sys.stderr)
    _succeed(next((code for code in codes if code), 0))


def _words(plan: Tier, out: Path, seeds: Sequence[int], more: Sequence[str]) -> list[object]:
    return ["--config", FOLDER / f"{plan.name}.yaml", *more, "--seeds", list(seeds), "--out", out]


def keep(plan: Tier, place: Path, seeds: Sequence[int], out: Path, more: Sequence[str]) -> None:
    """Keep what is small of a table, and of tested ones the table of the second endpoint, too."""
    print(f"{collect(place, out / plan.name, halves='SFTMix')} runs in {out / plan.name}", flush=True)
    if plan.name in TESTED:
        _succeed(compare(*_words(plan, place, seeds, more), "--metric", "eval_nll_best"))
        collect(place, out / f"{plan.name}-best", halves="SFTMix")
        _succeed(compare(*_words(plan, place, seeds, more)))  # the table of the first endpoint stays in its place


def _succeed(code: int) -> None:
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
