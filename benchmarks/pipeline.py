"""The cost of the whole recipe beside one plain fine-tuning run of the same epochs, by the source of its confidence.

    python benchmarks/pipeline.py                              base-7m, 640 Alpaca rows, 3 epochs, 3 rounds of five runs
    python benchmarks/pipeline.py --quick                      a trial of a few minutes with one thread, not kept

    plain     NTP, without pairs
    offline   a reference of the same size that scores all rows at five checkpoints
    online    a reference of the same size whose losses are taken while it trains
    weaker    a reference of about an eighth of the size, five checkpoints
    single    no reference: the target's own losses decide from the second epoch on

Every run is a process of its own and `sftmix.pipeline.recipe.run` from rows to exported model; they take turns, round
after round. The tokenisation cache is filled before the first. `run` leaves the imports out, `process` has them in.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import timed  # noqa: E402
from benchmarks.report import parse, parser, publish, spread  # noqa: E402
from benchmarks.stages import load_rows, random_llama  # noqa: E402
from sftmix.components.objectives import NTP, SFTMix  # noqa: E402
from sftmix.components.reference import Online, TrainedReference  # noqa: E402
from sftmix.config import RunConfig  # noqa: E402
from sftmix.options import DataOptions, ModelOptions, ReferenceModel, TrainingOptions  # noqa: E402
from sftmix.pipeline.recipe import run  # noqa: E402

SHARED = ROOT.parent / "shared"
QUICK = {"limit": 64, "max_length": 128, "rounds": 1}
ARMS = ("plain", "offline", "online", "weaker", "single")


def configuration(arm: str, args: argparse.Namespace, place: Path, out: Path) -> RunConfig:
    config = RunConfig(
        out=str(out),
        model=ModelOptions(path=args.model),
        data=DataOptions(train=args.rows, limit=args.limit, max_length=args.max_length),
        training=training_options(args),
    )
    if arm == "plain":
        config.objective, config.pairing = NTP(), None
        return config
    weaker = ReferenceModel(path=str(place / "weaker"))
    references = {
        "offline": TrainedReference(),
        "online": TrainedReference(checkpoints="online"),
        "weaker": TrainedReference(model=weaker),
        "single": Online(),
    }
    config.objective, config.reference = SFTMix(), references[arm]
    return config


def training_options(args: argparse.Namespace) -> TrainingOptions:
    return TrainingOptions(
        epochs=args.epochs,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        precision=args.precision,
        learning_rate=args.learning_rate,
    )


# ---------------------------------------------------------------------------------------------- runs


def one_run(args: argparse.Namespace) -> None:
    """Do the run of a process of --arm, then print its figures as the last line."""
    torch.set_num_threads(args.threads)
    config = configuration(args.arm, args, args.place, args.run)
    with contextlib.redirect_stdout(sys.stderr):
        _, took = timed(lambda: run(config))
    stages = {path.parent.name: json.loads(path.read_text()) for path in args.run.glob("*/figures.json")}
    kept = ("wall_seconds", "elapsed", "scoring_seconds", "calibration_seconds", "peak_memory_bytes")
    print(json.dumps({**took, "stages": {s: {k: f[k] for k in kept if k in f} for s, f in stages.items()}}))


def start(arm: str, args: argparse.Namespace, place: Path, out: Path) -> dict[str, Any]:
    """Make one run in a process of its own; return its time, with and without imports, and its stages' figures."""
    hidden = ["--arm", arm, "--place", str(place), "--run", str(out)]
    environment = {**os.environ, "SFTMIX_CACHE": str(place / "cache"), "OMP_NUM_THREADS": str(args.threads)}
    started = time.perf_counter()
    command = [sys.executable, __file__, *sys.argv[1:], *hidden]
    done = subprocess.run(
        command,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return {"process_seconds": time.perf_counter() - started, **json.loads(done.stdout.splitlines()[-1])}


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the seconds of each arm, its stages, and its ratio to the plain run of the same round."""
    results: dict[str, Any] = {}
    for arm, runs in found.items():
        made = {}
        for name, key in (("run", "seconds"), ("cpu", "cpu_seconds"), ("process", "process_seconds")):
            made[f"{name}_seconds"] = spread([one[key] for one in runs], 2)
            ratios = [one[key] / plain[key] for one, plain in zip(runs, found.get("plain", []), strict=False)]
            made |= {f"{name} / plain": spread(ratios, 3)} if ratios else {}
        results[arm] = {**made, "stages": {stage: _medians(runs, stage) for stage in runs[0]["stages"]}}
    return results


def _medians(runs: list[dict[str, Any]], stage: str) -> dict[str, float]:
    keys = runs[0]["stages"][stage]
    return {key: round(spread([one["stages"][stage][key] for one in runs])["median"], 2) for key in keys}


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
    for name in ("--arm", "--place", "--run"):
        options.add_argument(name, type=str if name == "--arm" else Path, help=argparse.SUPPRESS)
    args = parse(options, QUICK)
    if args.arm:
        one_run(args)
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        random_llama(args.model, place / "weaker", hidden_size=128, num_hidden_layers=2)
        os.environ["SFTMIX_CACHE"] = str(place / "cache")
        load_rows(args.model, args.rows, limit=args.limit, max_length=args.max_length)
        load_rows(str(place / "weaker"), args.rows, limit=args.limit, max_length=args.max_length)
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
        for number in range(args.rounds):
            for arm in args.arms:
                found[arm].append(start(arm, args, place, place / f"{arm}-{number}"))
    hidden = argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in ("arm", "place", "run")})
    publish("pipeline", hidden, {"arms": summary(found)}, packages=("transformers",))


if __name__ == "__main__":
    main()
