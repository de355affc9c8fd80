"""The figures of `estimate` beside those of runs: peak memory and FLOPs of the training stage, for several settings.

    python benchmarks/estimate.py              a random Llama of 59M parameters, Alpaca rows, eight settings
    python benchmarks/estimate.py --model M    a model of yours
    python benchmarks/estimate.py --quick      a trial of a few minutes with one thread, not kept

Each setting is estimated in one process and run in another (`--splitter RandomSplit`, a few steps without checkpoints),
whose peak of resident memory from the start of the stage is compared. glibc keeps some freed memory, depending
on the order of sizes, which `estimate` cannot know; with --give_back the run returns it to the system
(MALLOC_MMAP_THRESHOLD_). FLOPs over the time of the steps is the rate that `--tflops` and `--mfu` stand for.
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

from benchmarks.report import parse, parser, publish  # noqa: E402
from benchmarks.stages import random_llama  # noqa: E402

SHARED = ROOT.parent / "shared"
QUICK = {"hidden_size": 256, "layers": 2, "limit": 64, "steps": 2}
SETTINGS = {
    "as it is": [],
    "one micro-batch": ["--training.global_batch_size", "8"],
    "larger micro-batches": ["--training.micro_batch_size", "16"],
    "recomputed activations": ["--training.activation_checkpointing", "true"],
    "bf16": ["--training.precision", "bf16"],
    "eager attention": ["--model.attention", "eager"],
    "LoRA": ["--model.lora.r", "16"],
    "LoRA in bf16": ["--model.lora.r", "16", "--training.precision", "bf16"],
}


def cli(args: argparse.Namespace, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    if args.give_back:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    command = [sys.executable, str(ROOT / "cli.py"), *words]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def compared(args: argparse.Namespace, model: str, own: list[str], out: Path) -> dict[str, Any]:
    """Return estimated and measured peak of one setting, MiB, and the rate of its steps."""
    words = ["--model.path", model, "--data.train", args.rows, "--data.limit", str(args.limit)]
    words += ["--data.max_length", str(args.max_length), "--splitter", "RandomSplit"]
    words += ["--training.max_steps", str(args.steps), "--training.global_batch_size", "16", "--checkpoint.every", "0"]
    words += own
    said = json.loads(
        cli(args, "estimate", *words, "--gpu", "cpu" if args.device == "cpu" else "H100", "--gpus", "1", "--json")
    )["stages"]["train"]
    cli(args, "run", *words, "--out", str(out))
    figures = json.loads((out / "train" / "figures.json").read_text())
    peaks = said["memory_bytes"]["peak"], figures["peak_memory_bytes"]
    return {
        "estimated_mib": round(peaks[0] / 2**20),
        "measured_mib": round(peaks[1] / 2**20),
        "estimated / measured": round(peaks[0] / peaks[1], 3),
        "parts_mib": {name: round(size / 2**20) for name, size in said["memory_bytes"].items()},
        "gflops_per_second": round(said["training_flops"] / figures["elapsed"] / 1e9, 1),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", help="directory of a model, in place of the random one")
    options.add_argument("--source", default=str(SHARED / "models" / "base-7m"), help="whose tokenizer is taken")
    options.add_argument("--rows", default=str(SHARED / "data" / "alpaca" / "alpaca_8k.json"))
    options.add_argument("--limit", type=int, default=400)
    options.add_argument("--max_length", type=int, default=512)
    options.add_argument("--hidden_size", type=int, default=768)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--give_back", action="store_true", help="freed memory is returned to the system at once")
    options.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    args = parse(options, QUICK)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        os.environ["SFTMIX_CACHE"] = str(place / "cache")
        sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers}
        model = args.model or random_llama(args.source, place / "model", **sizes)
        found = {}
        for number, name in enumerate(args.settings):
            found[name] = compared(args, model, SETTINGS[name], place / str(number))
            print(name, found[name], file=sys.stderr, flush=True)
    some = [] if args.settings == list(SETTINGS) else [name.replace(" ", "-") for name in args.settings]
    named = [Path(args.model).name] if args.model else []
    variant = "-".join([*named, *some, *(["give-back"] if args.give_back else [])])
    publish("estimate", args, {"settings": found}, variant=variant)


if __name__ == "__main__":
    main()
