"""Run the study: all of it, or some of its tables, each with its seeds divided among several processes.

    python benchmarks/evidence/run.py --rows ../shared/data/alpaca/alpaca_8k.json --jobs 2
    python benchmarks/evidence/run.py --tables primary overfit --jobs 2
    python benchmarks/evidence/run.py --tables primary --seeds 4 5 6 --options --model.path DIR

Each table comes in the place that the preregistration names for it, what is small of it is kept in
benchmarks/results/evidence, and its README.md is drawn anew. The same command continues what was interrupted. The
pilots' values stand in study.yaml and primary.yaml; pilots that come out otherwise change nothing by themselves.

With several jobs the seeds that are missing are dealt to directories beside the table, TABLE.part-1, TABLE.part-2, ...
Each is run by a process of one thread, which trains a reference of its own: the same one, since its seed is the same.
The parts then become one table (join.py). Delete them when the table is there. The tables of known truth have a
reference for each seed; they run one after another.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.collect import collect  # noqa: E402
from benchmarks.evidence.join import compare, link_runs  # noqa: E402
from benchmarks.evidence.tiers import FOLDER, PILOTS, RESULTS, TITLES, Tier, read_tier  # noqa: E402
from sftmix.common.errors import ConfigError, SFTMixError  # noqa: E402
from sftmix.pipeline.hold import Hold  # noqa: E402
from sftmix.tools.compare.cells import is_over  # noqa: E402

IN_PRIMARY = ("parts", "others")
"""Tables in the directory of tier 1, whose NTP and SFTMix they read back."""
KNOWN = "known-truth"
"""The four tables of rows whose truth is known, which have a plan of their own."""
KNOWN_ORDER = (20, 0, 40, 10)
"""Percent of corrupted responses, in the order of that plan."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = (*PILOTS, *TITLES, KNOWN)
    parser.add_argument(
        "--tables", nargs="+", default=everything, choices=everything, help="in this order; default all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="some of the seeds; all of the plan's if left out")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, of one thread each")
    parser.add_argument("--rows", type=Path, help="alpaca_8k.json, of which the rows are made if they are not there")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of the tables")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of all results")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the rest goes to compare as it stands")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; allowed: 1 and above")
    if options.rows and not (options.runs / "data").is_dir():
        _script("prepare", "--rows", options.rows, "--out", options.runs / "data")
    try:
        for name in options.tables:
            if name == KNOWN:
                run_known_truth(options.runs / KNOWN, options.out / KNOWN, options.options)
                continue
            plan = read_tier(name)
            place = options.runs / ("primary" if name in IN_PRIMARY else name)
            run_table(plan, place, _seeds(plan, options.seeds), options.jobs, options.options)
            print(f"{collect(place, options.out / name, halves='SFTMix')} runs in {options.out / name}", flush=True)
    except SFTMixError as error:
        sys.exit(f"error: {error}")
    if options.out == RESULTS:
        _script("results")


def _script(name: str, *words: object) -> None:
    """Run a script of this folder; leave the program with its exit code if it fails."""
    _succeed(subprocess.run([sys.executable, FOLDER / f"{name}.py", *map(str, words)], check=False).returncode)


def run_known_truth(place: Path, out: Path, more: Sequence[str]) -> None:
    """Run the tables of rows whose truth is known, and keep their figures."""
    if not (place / "data").is_dir():
        _script("known_rows", "--out", place / "data")
    for share in KNOWN_ORDER:
        words = ("--config", FOLDER / KNOWN / f"corrupted-{share}.yaml", *more, "--out", place / f"corrupted-{share}")
        _succeed(compare(*words))
    _script("known_truth", "--tables", place, "--out", out)


def _seeds(plan: Tier, chosen: Sequence[int] | None) -> list[int]:
    """Return the seeds of the plan, or those of them that were chosen."""
    others = sorted(set(chosen or ()) - set(plan.seeds))
    if others:
        sys.exit(f"error: --seeds {others[0]} is no seed of {plan.name}; its seeds: {', '.join(map(str, plan.seeds))}")
    return sorted(chosen or plan.seeds)


def run_table(plan: Tier, place: Path, seeds: Sequence[int], jobs: int, more: Sequence[str]) -> None:
    """Run the missing cells of a table at these seeds; leave the program with the exit code of a part that failed."""
    missing = [seed for seed in seeds if not all(is_over(place / arm / f"seed-{seed}") for arm in plan.arms)]
    dealt = [missing[job::jobs] for job in range(min(jobs, len(missing)))]
    if len(dealt) > 1:
        _refuse_begun(place / arm / f"seed-{seed}" for arm in plan.arms for seed in missing)
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


def _refuse_begun(cells: Iterable[Path]) -> None:
    """Raise ConfigError, before hours of work, for a run that no part could replace."""
    for cell in cells:
        if cell.exists() and not is_over(cell):
            raise ConfigError(f"{cell} was begun without parts: finish it with --jobs 1, or move it away")


def _succeed(code: int) -> None:
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
