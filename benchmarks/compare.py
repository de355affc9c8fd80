"""The cost of a table beside its runs: wall time of `compare` / summed wall time of the distinct stages in it.

    python benchmarks/compare.py --seeds 3 --steps 40

Four variants on the quickstart's model and rows, in a process of its own: imports, parsing, reading the cache, checking
hashes, adopting stages and writing tables are all in the numerator, and in no stage. The tokenisation cache is empty at
first. `again` is the same command on the finished table, as a share of the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import parser, publish  # noqa: E402
from sftmix.tools.quickstart import materialise  # noqa: E402

VARIANTS = """
variants:
  NTP: {objective: NTP}
  SFTMix: {}
  mu-1: {objective.mu: 1}
  random: {splitter: RandomSplit}
"""


def timed(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def stages(table: Path) -> dict[str, list[float]]:
    """Return the wall seconds of every stage that was made, not adopted, by its name."""
    found: dict[str, list[float]] = {}
    for figures in sorted(table.glob("*/seed-*/*/figures.json")):
        if not (figures.parent / "adopted.json").exists():
            found.setdefault(figures.parent.name, []).append(json.loads(figures.read_text())["wall_seconds"])
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=40, help="optimizer steps of every training")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        made = materialise(place / "materials", seed=0)
        (place / "table.yaml").write_text(f"base: recipe:quickstart\n{VARIANTS}")
        command = [sys.executable, str(ROOT / "cli.py"), "compare", "--config", str(place / "table.yaml")]
        command += ["--model.path", str(made.model), "--data.train", str(made.train), "--data.eval", str(made.eval)]
        command += ["--seeds", str(list(range(1, args.seeds + 1))), "--training.max_steps", str(args.steps)]
        command += ["--out", str(place / "table")]
        environment = {**os.environ, "SFTMIX_CACHE": str(place / "cache"), "OMP_NUM_THREADS": str(args.threads)}
        wall = timed(command, environment)
        distinct = stages(place / "table")
        again = timed(command, environment)
    total = sum(map(sum, distinct.values()))
    results = {
        "ratio": round(wall / total, 3),
        "wall_seconds": round(wall, 1),
        "stage_seconds": round(total, 1),
        "stages": {name: {"made": len(s), "seconds": round(sum(s), 1)} for name, s in distinct.items()},
        "again": round(again / wall, 3),
    }
    publish("compare", args, results, variant=f"{args.steps}-steps")


if __name__ == "__main__":
    main()
