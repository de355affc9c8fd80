"""Ours against TRL's SFTTrainer on a real language model: real tokens a second, and memory.

    python benchmarks/real_speed.py --model DIR                    a directory of real_models.py
    python benchmarks/real_speed.py --model DIR --precision bf16

Several models of this size do not fit the memory together, so contestants take turns run by run, in a process of their
own each: `--rounds` times one epoch of the same rows from the same weights. The time is that of the whole epoch, which
is the same work for all. The memory is what the process has resident at its peak. Contestants are described in
trl_compare.py; TRL 1.16 knows `loss_type="chunked_nll"` only as a deprecated alias of its default.
"""

import sys
from argparse import Namespace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contestants import OURS, TRL, contestant  # noqa: E402
from benchmarks.report import parse, parser, publish, spread  # noqa: E402

SHARED = ROOT.parent / "shared"
QUICK = {"limit": 16, "global_batch_size": 8, "rounds": 1, "max_length": 64}
UNDISTURBED = 0.85
"""Smallest share of the threads' time that an epoch must have had: below it something else was running."""


def epoch(name: str, args: Namespace) -> dict[str, float]:
    """Train one epoch in a process of its own, and return its figures."""
    context = get_context("spawn")
    line, theirs = context.Pipe()
    process = context.Process(target=contestant, args=(name, theirs, args), daemon=True)
    process.start()
    theirs.close()
    steps = []
    for _ in range(args.limit // args.global_batch_size):
        line.send("go")
        steps.append(line.recv())
    figures = line.recv()
    process.join()
    seconds, cpu_seconds = (sum(step[key] for step in steps) for key in ("seconds", "cpu_seconds"))
    found = {
        "seconds": seconds,
        "tokens_per_second": figures["tokens"] / seconds,
        "peak_gib": figures["peak_mib"] / 1024,
    }
    return found | {"busy": cpu_seconds / seconds / args.threads, "filled": figures["tokens"] / figures["slots"]}


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    digits = {"tokens_per_second": 1, "seconds": 2, "peak_gib": 2, "busy": 2, "filled": 3}
    return {key: spread([one[key] for one in rounds], places) for key, places in digits.items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--rows", default=str(SHARED / "data" / "alpaca" / "alpaca_8k.json"))
    options.add_argument("--limit", type=int, default=32, help="rows of an epoch, a multiple of the global batch")
    options.add_argument("--max_length", type=int, default=256)
    options.add_argument("--global_batch_size", type=int, default=16)
    options.add_argument("--micro_batch_size", type=int, default=8, help="ours; the default")
    options.add_argument("--trl_micro_batch_size", type=int, default=8, help="of TRL but trl_best; its default")
    options.add_argument("--trl_best_micro_batch_size", type=int, default=4)
    options.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options.add_argument("--learning_rate", type=float, default=1e-5)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--contestants", nargs="+", default=[*OURS, *TRL], choices=[*TRL, *OURS])
    args = parse(options, QUICK)
    setting = Namespace(**vars(args), epochs=1, held_out=0)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in args.contestants}
    for _ in range(args.rounds):
        for name in args.contestants:
            rounds[name].append(epoch(name, setting))
            print(name, {key: round(value, 3) for key, value in rounds[name][-1].items()}, flush=True)
    disturbed = [name for name, found in rounds.items() if min(one["busy"] for one in found) < UNDISTURBED]
    found = {name: summary(each) for name, each in rounds.items()}
    ratios = {
        f"{ours} / {other}": {
            "speed": spread([b["seconds"] / a["seconds"] for a, b in zip(rounds[ours], rounds[other], strict=True)]),
            "peak": round(found[ours]["peak_gib"]["median"] / found[other]["peak_gib"]["median"], 3),
        }
        for ours in OURS
        for other in ("ours_ntp", *TRL)
        if {ours, other} <= {*rounds} and ours != other
    }
    results = {"contestants": found, "ratios": ratios, "disturbed": disturbed}
    variant = f"{Path(args.model).name}-{args.precision}"
    publish("real_speed", args, results, variant=variant, packages=("transformers", "trl"))


if __name__ == "__main__":
    main()
