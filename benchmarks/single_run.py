"""What single-run SFTMix costs beside plain fine-tuning: wall time of `--reference Online` / of `--objective NTP`.

    python benchmarks/single_run.py --rounds 5 --epochs 3

Whole runs on the quickstart's model and rows, in one process each, in turns: data, training, the splits between the
epochs, measurement and export are all in. `train` is the ratio of the training stages alone (their `elapsed`). The
tokenisation cache is filled before the first.
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

from benchmarks.report import parser, publish, spread  # noqa: E402
from sftmix.quickstart import materialise  # noqa: E402

ARMS = {"ntp": ["--objective", "NTP", "--pairing", "null"], "single": ["--reference", "Online"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--epochs", type=int, default=3)
    args = options.parse_args()
    wall: dict[str, list[float]] = {arm: [] for arm in ARMS}
    train: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        made = materialise(place / "materials", seed=0)
        command = [sys.executable, str(ROOT / "cli.py"), "run", "--config", "recipe:quickstart"]
        command += ["--model.path", str(made.model), "--data.train", str(made.train), "--data.eval", str(made.eval)]
        command += ["--training.epochs", str(args.epochs)]
        environment = {**os.environ, "SFTMIX_CACHE": str(place / "cache"), "OMP_NUM_THREADS": str(args.threads)}
        for number in range(-1, args.rounds):  # the first fills the cache
            for arm, words in ARMS.items():
                out = place / f"{arm}-{number}"
                started = time.perf_counter()
                subprocess.run([*command, *words, "--out", str(out)], env=environment, check=True, capture_output=True)
                if number >= 0:
                    wall[arm].append(time.perf_counter() - started)
                    train[arm].append(json.loads((out / "train" / "figures.json").read_text())["elapsed"])
    results = {}
    for name, seconds in (("wall", wall), ("train", train)):
        ratios = [single / ntp for single, ntp in zip(seconds["single"], seconds["ntp"], strict=True)]
        results[name] = {"ratio": spread(ratios), **{f"{arm}_seconds": spread(seconds[arm], 2) for arm in ARMS}}
    publish("single_run", args, results)


if __name__ == "__main__":
    main()
