"""A training step with Mixup against one without, and three ways to lay out a micro-batch.

    python benchmarks/step.py --model DIR --rows FILE
    python benchmarks/step.py --quick                a trial of a few minutes with one thread, not kept

Six training loops take turns, step by step, on the same global batches: NTP and SFTMix, each with padded
micro-batches, padded in groups of similar length (the default on a CPU), and in one row without padding (the default on
a GPU whose attention does no work between examples). NTP is paired as SFTMix pairs, so it has the same order. A
seventh takes its turn: scoring a part of the rows. With `--layouts "length groups" "length groups, compiled"` the
first layout is compared with compiled decoder layers; `--warm_up` rounds should then be enough to compile them.

Reports seconds per step, ratios step by step, real tokens per second and per slot, and MFU: the FLOPs that the real
tokens need (causal attention, head on response tokens) as a share of what the best matrix product reaches on this
device, in this run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import timed  # noqa: E402
from benchmarks.report import parse, parser, publish, spread  # noqa: E402
from benchmarks.stages import load_rows, ntp_stage, tokens_and_slots  # noqa: E402
from sftmix.batches.rows import RowSubset  # noqa: E402
from sftmix.common.world import World  # noqa: E402
from sftmix.components.objectives import NTP, SFTMix  # noqa: E402
from sftmix.data import EncodedDataset  # noqa: E402
from sftmix.model.load import load_model  # noqa: E402
from sftmix.options import LoraOptions, TrainingOptions  # noqa: E402
from sftmix.tools.estimate.model import FakeModel  # noqa: E402
from sftmix.tools.estimate.needs import training_flops  # noqa: E402
from sftmix.tools.estimate.work import amount_of  # noqa: E402
from sftmix.training.loop import Stage, TrainingLoop  # noqa: E402
from sftmix.training.parallel import training_module  # noqa: E402

SHARED = ROOT.parent / "shared"
QUICK = {"limit": 160, "max_length": 128, "steps": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"length_groups": 1, "padding_free": False},
    "length groups": {"padding_free": False},
    "padding-free": {"padding_free": True},
    "length groups, compiled": {"padding_free": False, "compile": True},
}
DEFAULT = ["padded", "length groups", "padding-free"]
OBJECTIVES = {"ntp": NTP, "sftmix": SFTMix}
SCORED = 320
MATMULS = (1024, 2048, 4096)


def alternate(contestants: dict[str, Callable[[], float]], args: Namespace) -> dict[str, list[dict[str, float]]]:
    """Return seconds, CPU seconds and tokens of each contestant's turns, without those of the first rounds."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for number in range(args.steps + args.warm_up):
        for name, run in contestants.items():
            tokens, took = timed(run)
            if number >= args.warm_up:
                seen[name].append({**took, "tokens": tokens})
    return seen


def step_of(loop: TrainingLoop) -> Callable[[], float]:
    return lambda: loop.advance()[0]["tokens"]


def scoring_of(stage: Stage, world: World) -> Callable[[], float]:
    """Return a function that scores another part of the rows at each call, and starts again after the last.

    Rows are sorted by length before scoring: parts of a few rows would have more padding than in a run.
    """
    assert stage.scorer is not None
    rows, score = np.arange(len(stage.data)), stage.scorer
    turns = cycle(np.array_split(rows, max(1, len(rows) // SCORED)))
    module = training_module(stage.model, stage.options, precision=stage.options.precision, world=world)

    def run() -> float:
        part = RowSubset(stage.data, next(turns))
        score(module, part)
        return float(part.lengths.sum())

    return run


def fill(loop: TrainingLoop) -> float:
    """Return the share of the slots of the loop's micro-batches that hold a real token, over up to 40 steps."""
    tokens, slots = tokens_and_slots(loop.stage, loop.world, loop.module, min(40, loop.total))
    return round(tokens / slots, 4)


def flops_of(loop: TrainingLoop, args: Namespace) -> float:
    """Return the FLOPs that the real tokens of the timed steps need."""
    model, total = FakeModel(args.model, None, LoraOptions()), 0.0
    for number in range(args.warm_up, args.steps + args.warm_up):
        rows = np.array([slot.row for unit in loop.stage.order.batch(number) for slot in unit])
        total += training_flops(model, amount_of(cast(EncodedDataset, loop.stage.data), rows), recompute=False)
    return total


def best_matmul(args: Namespace) -> float:
    """Return the FLOP/s of the fastest of some square matrix products in the precision of the run."""
    kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
    best = 0.0
    for size in MATMULS:
        a, b = (torch.randn(size, size, device=args.device, dtype=kind) for _ in range(2))
        for _ in range(4):
            start = time.perf_counter()
            a @ b
            if args.device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def make_loops(args: Namespace, world: World, directory: Path) -> dict[str, TrainingLoop]:
    """Return a loop for each objective and layout, all with the same weights and global batches."""
    data = load_rows(args.model, args.rows, limit=args.limit, max_length=args.max_length)
    shared: dict[str, Any] = {
        "global_batch_size": args.global_batch_size,
        "micro_batch_size": args.micro_batch_size,
        "precision": args.precision,
        "max_steps": args.steps + args.warm_up,
        "learning_rate": 1e-4,
    }
    loops = {}
    for layout in args.layouts:
        options = TrainingOptions(**shared, **LAYOUTS[layout])
        for name, objective in OBJECTIVES.items():
            stage = ntp_stage(load_model(args.model), data, options, world, directory)
            loops[f"{name}, {layout}"] = TrainingLoop(replace(stage, name=name, objective=objective()), world)
    return loops


def results(seen: dict[str, list[dict[str, float]]], loops: dict[str, TrainingLoop], args: Namespace) -> dict:
    def each(name: str, key: str) -> list[float]:
        return [turn[key] for turn in seen[name]]

    def ratio(a: str, b: str, key: str = "seconds") -> dict[str, float]:
        return spread([x / y for x, y in zip(each(a, key), each(b, key), strict=True)])

    def speed(name: str) -> float:
        return sum(each(name, "tokens")) / sum(each(name, "seconds"))

    layouts, peak = args.layouts, best_matmul(args)
    pairs = {layout: (f"sftmix, {layout}", f"ntp, {layout}") for layout in layouts}
    first = f"ntp, {layouts[0]}"
    return {
        "seconds_per_step": {name: spread(each(name, "seconds")) for name in loops},
        "sftmix / ntp, step by step": {layout: ratio(*pair) for layout, pair in pairs.items()},
        "sftmix / ntp, CPU time": {layout: ratio(*pair, "cpu_seconds") for layout, pair in pairs.items()},
        f"{layouts[0]} / other layouts, step by step": {k: ratio(first, f"ntp, {k}") for k in layouts[1:]},
        "real_tokens_per_second": {name: round(speed(name), 1) for name in seen},
        "scoring / training tokens per second": {
            layout: round(speed("scoring") / speed(ntp), 3) for layout, (_, ntp) in pairs.items()
        },
        "real tokens / slots": {layout: fill(loops[ntp]) for layout, (_, ntp) in pairs.items()},
        "best_matmul_gflops": round(peak / 1e9, 1),
        "mfu": {
            name: round(flops_of(loop, args) / sum(each(name, "seconds")) / peak, 4) for name, loop in loops.items()
        },
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=str(SHARED / "models" / "base-7m"))
    options.add_argument("--rows", default=str(SHARED / "data" / "alpaca" / "alpaca_8k.json"))
    options.add_argument("--limit", type=int, default=1600)
    options.add_argument("--max_length", type=int, default=512)
    options.add_argument("--global_batch_size", type=int, default=32)
    options.add_argument("--micro_batch_size", type=int, default=16)
    options.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options.add_argument("--steps", type=int, default=12, help="that are timed, of each contestant")
    options.add_argument("--warm_up", type=int, default=2, help="rounds before them")
    options.add_argument("--layouts", nargs="+", default=DEFAULT, choices=list(LAYOUTS))
    args = parse(options, QUICK)
    torch.set_num_threads(args.threads)
    world = World(device=torch.device(args.device))
    with tempfile.TemporaryDirectory() as directory:
        loops = make_loops(args, world, Path(directory))
        stage = next(iter(loops.values())).stage
        contestants = {name: step_of(loop) for name, loop in loops.items()}
        contestants["scoring"] = scoring_of(replace(stage, model=load_model(args.model)), world)
        found = results(alternate(contestants, args), loops, args)
    chosen = "" if args.layouts == DEFAULT else "-".join(args.layouts).replace(",", "").replace(" ", "-")
    publish("step", args, found, variant=chosen, packages=("transformers",))


if __name__ == "__main__":
    main()
