"""Run the study: all of it, or some of its tables, and keep what is small of each.

    python benchmarks/evidence/run.py --rows ../shared/data/alpaca/alpaca_8k.json
    python benchmarks/evidence/run.py --tables primary overfit --seeds 4 5 6 --options --model.path DIR

Each table comes in the place that the preregistration names for it, and what is small of it is kept in
benchmarks/results/evidence. The same command continues what was interrupted. The pilots' values stand in study.yaml and
primary.yaml; pilots that come out otherwise change nothing by themselves.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.tiers import FOLDER, PILOTS, RESULTS, TITLES  # noqa: E402

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
    parser.add_argument("--seeds", nargs="+", help="seeds of the tiers; those of the plan if left out")
    parser.add_argument("--rows", type=Path, help="alpaca_8k.json, of which the rows are made if they are not there")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of the tables")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of all results")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the rest goes to compare as it stands")
    options = parser.parse_args()
    if options.rows and not (options.runs / "data").is_dir():
        _script("prepare", "--rows", options.rows, "--out", options.runs / "data")
    for name in options.tables:
        if name == KNOWN:
            run_known_truth(options.runs / KNOWN, options.out / KNOWN, options.options)
            continue
        place = options.runs / ("primary" if name in IN_PRIMARY else name)
        seeds = ["--seeds", f"[{','.join(options.seeds)}]"] if options.seeds else []
        _compare(name, *options.options, *seeds, "--out", place)
        _script("collect", "--table", place, "--name", name, "--out", options.out)


def run_known_truth(place: Path, out: Path, more: Sequence[str]) -> None:
    """Run the tables of rows whose truth is known, and keep their figures."""
    if not (place / "data").is_dir():
        _script("known_rows", "--out", place / "data")
    for share in KNOWN_ORDER:
        _compare(f"{KNOWN}/corrupted-{share}", *more, "--out", place / f"corrupted-{share}")
    _script("known_truth", "--tables", place, "--out", out)


def _compare(table: str, *words: object) -> None:
    _run("-m", "sftmix", "compare", "--config", FOLDER / f"{table}.yaml", *words)


def _script(name: str, *words: object) -> None:
    _run(FOLDER / f"{name}.py", *words)


def _run(*words: object) -> None:
    """Run Python with these words; leave the program with its exit code if it fails."""
    code = subprocess.run([sys.executable, *map(str, words)], check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
