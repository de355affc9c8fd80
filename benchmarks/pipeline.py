"""The cost of the whole recipe beside one plain fine-tuning run of the same epochs, by the source of its confidence.

    python benchmarks/pipeline.py                              base-7m, 640 Alpaca rows, 3 epochs, 3 rounds of five runs
    python benchmarks/pipeline.py --quick                      a trial of a few minutes with one thread, not kept

    plain     NTP, without pairs
    offline   a reference of the same size that scores all rows at five checkpoints
    online    a reference of the same size whose losses are taken while it trains
    weaker    a reference of about an eighth of the size, five checkpoints
    single    no reference: the target's own losses decide from the second epoch on

Every run is `cli.py run` from rows to exported model, imports included; they take turns, round after round. The
tokenisation cache is filled before the first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import timed  # noqa: E402
from benchmarks.report import parse, parser, publish, spread  # noqa: E402
from benchmarks.stages import load_rows, random_llama  # noqa: E402

SHARED = ROOT.parent / "shared"
QUICK = {"limit": 64, "max_length": 128, "rounds": 1}
ARMS = {
    "plain": ["--objective", "NTP", "--pairing", "null"],
    "offline": [],
    "online": ["--reference.checkpoints", "online"],
    "weaker": ["--reference.model.path", "weaker"],
    "single": ["--reference", "Online"],
}
TRAINING = ("epochs", "global_batch_size", "micro_batch_size", "precision", "learning_rate")
FIGURES = ("wall_seconds", "elapsed", "scoring_seconds", "calibration_seconds", "peak_memory_bytes")


def start(arm: str, args: argparse.Namespace, place: Path, out: Path) -> dict[str, Any]:
    """Make one run in a process of its own, in `place`; return its time and its stages' figures."""
    words = [*(sys.executable, str(ROOT / "cli.py"), "run", "--model.path", args.model, "--out", str(out))]
    words += ["--data.train", args.rows, "--data.limit", str(args.limit), "--data.max_length", str(args.max_length)]
    words += [word for name in TRAINING for word in (f"--training.{name}", str(getattr(args, name)))]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    command = [*words, *ARMS[arm]]
    _, took = timed(lambda: subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.PIPE))
    stages = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/figures.json")}
    return {**took, "stages": {s: {k: f[k] for k in FIGURES if k in f} for s, f in stages.items()}}


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the seconds of each arm, its stages, and its ratio to the plain run of the same round."""
    results: dict[str, Any] = {}
    for arm, runs in found.items():
        made: dict[str, Any] = {}
        for name, key in (("process", "seconds"), ("cpu", "cpu_seconds")):
            made[f"{name}_seconds"] = spread([one[key] for one in runs], 2)
            ratios = [one[key] / plain[key] for one, plain in zip(runs, found.get("plain", []), strict=False)]
            made |= {f"{name} / plain": spread(ratios, 3)} if ratios else {}
        made["stages"] = {
            stage: {key: round(spread([one["stages"][stage][key] for one in runs])["median"], 2) for key in figures}
            for stage, figures in runs[0]["stages"].items()
        }
        results[arm] = made
    return results


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=str(SHARED / "models" / "base-7m"))
    options.add_argument("--rows", default=str(SHARED / "data" / "alpaca" / "alpaca_8k.json"))
    options.add_argument("--limit", type=int, default=640)
    options.add_argument("--max_length", type=int, default=512)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--global_batch_size", type=int, default=32)
    options.add_argument("--micro_batch_size", type=int, default=16)
    options.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options.add_argument("--learning_rate", type=float, default=2e-4)
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    args = parse(options, QUICK)
    args.model, args.rows = (str(Path(given).resolve()) for given in (args.model, args.rows))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        random_llama(args.model, place / "weaker", hidden_size=128, num_hidden_layers=2)
        os.environ["SFTMIX_CACHE"] = str(place / "cache")
        for model in (args.model, str(place / "weaker")):
            load_rows(model, args.rows, limit=args.limit, max_length=args.max_length)
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
        for number in range(args.rounds):
            for arm in args.arms:
                found[arm].append(start(arm, args, place, place / f"{arm}-{number}"))
    publish("pipeline", args, {"arms": summary(found)}, packages=("transformers",))


if __name__ == "__main__":
    main()
