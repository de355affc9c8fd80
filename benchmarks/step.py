"""A training step with Mixup against one without, and three ways to lay out a micro-batch.

    python benchmarks/step.py --model DIR --rows FILE
    python benchmarks/step.py --quick                a trial of a few minutes with one thread, not kept

Six training loops take turns, step by step, on the same global batches: NTP and SFTMix, each with padded
micro-batches, padded in groups of similar length (the default on a CPU), and in one row without padding (the default on
a GPU whose attention does no work between examples). NTP is paired as SFTMix pairs, so it has the same order. A
seventh takes its turn: scoring a part of the rows. With `--layouts "length groups" "length groups, compiled"` the
first layout is compared with compiled decoder layers; `--warm_up` rounds should then be enough to compile them; with
`"length groups, LoRA"`, with adapters of rank 16 (their memory: estimate.py). With `--random` the weights are random,
and all loops train the same ones with one optimizer, so that a large model fits.

Reports seconds per step, ratios step by step, real tokens per second and per slot, and MFU: the FLOPs that the real
tokens need (causal attention, head on response tokens) as a share of what the best matrix product reaches on this
device, in this run. One more step of each loop is profiled: what it calls that may wait for the GPU, what is busiest.
"""

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import timed  # noqa: E402
from benchmarks.report import parse, parser, publish, spread  # noqa: E402
from benchmarks.stages import load_rows, ntp_stage, tokens_and_slots  # noqa: E402
from sftmix.batches.order import RowSubset  # noqa: E402
from sftmix.common.world import World  # noqa: E402
from sftmix.components.objectives import NTP, SFTMix  # noqa: E402
from sftmix.data import EncodedDataset  # noqa: E402
from sftmix.model.adapters import add_adapters  # noqa: E402
from sftmix.model.load import load_model, model_config  # noqa: E402
from sftmix.options import LoraOptions, TrainingOptions  # noqa: E402
from sftmix.tools.estimate.model import FakeModel, training_flops  # noqa: E402
from sftmix.tools.estimate.work import amount_of  # noqa: E402
from sftmix.training.loop import Stage, TrainingLoop  # noqa: E402
from sftmix.training.memory import PeakMemory  # noqa: E402
from sftmix.training.parallel import training_module  # noqa: E402

SHARED = ROOT.parent / "shared"
QUICK = {"limit": 160, "max_length": 128, "steps": 2}
LORA, ADAPTERS = "length groups, LoRA", LoraOptions(r=16)
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"length_groups": 1, "padding_free": False},
    "length groups": {"padding_free": False},
    "padding-free": {"padding_free": True},
    "length groups, compiled": {"padding_free": False, "compile": True},
    LORA: {"padding_free": False},
}
DEFAULT = ["padded", "length groups", "padding-free"]
OBJECTIVES = {"ntp": NTP, "sftmix": SFTMix}
SCORED = 320
MATMULS = (1024, 2048, 4096)
WAITS = ["aten::item", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync"]
WAITS += ["cudaLaunchKernel"]


def alternate(contestants: dict[str, Callable[[], float]], args: Namespace) -> dict[str, list[dict[str, float]]]:
    """Return seconds, CPU seconds and tokens of each contestant's turns, without those of the first rounds."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for number in range(args.steps + args.warm_up):
        for name, run in contestants.items():
            memory = PeakMemory(torch.device(args.device))
            tokens, took = timed(run)
            if number >= args.warm_up:
                seen[name].append({**took, "tokens": tokens, "peak_gib": memory.bytes() / 2**30})
    return seen


def step_of(loop: TrainingLoop) -> Callable[[], float]:
    def run() -> float:
        metrics = loop.advance()
        if loop.world.device.type == "cuda":
            torch.cuda.synchronize()
        return metrics["tokens"]

    return run


def profiled(run: Callable[[], float], args: Namespace) -> dict[str, dict[str, float]]:
    """Return how often one call did what may wait for the GPU, and the milliseconds of its busiest operations."""
    with torch.profiler.profile() as profile:
        run()
    found, clock = profile.key_averages(), "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    busiest = sorted(found, key=lambda each: -getattr(each, clock))[:12]
    return {
        "calls": {each.key: each.count for each in found if each.key in WAITS},
        "busiest_ms": {each.key[:80]: round(getattr(each, clock) / 1e3, 2) for each in busiest},
    }


def scoring_of(stage: Stage, module: nn.Module) -> Callable[[], float]:
    """Return a function that scores another part of the rows at each call, and starts again after the last.

    Rows are sorted by length before scoring: parts of a few rows would have more padding than in a run.
    """
    assert stage.scorer is not None
    rows, score = np.arange(len(stage.data)), stage.scorer
    turns = cycle(np.array_split(rows, max(1, len(rows) // SCORED)))

    def run() -> float:
        part = RowSubset(stage.data, next(turns))
        score(module, part)
        return float(part.lengths.sum())

    return run


def fill(loop: TrainingLoop) -> float:
    """Return the share of the slots of the loop's micro-batches that hold a real token, over up to 40 steps."""
    tokens, slots = tokens_and_slots(loop.stage, loop.world, loop.module, min(40, loop.total))
    return round(tokens / slots, 4)


def flops_of(loop: TrainingLoop, args: Namespace, lora: LoraOptions) -> float:
    """Return the FLOPs that the real tokens of the timed steps need."""
    model, total = FakeModel(args.model, None, lora), 0.0
    for number in range(args.warm_up, args.steps + args.warm_up):
        rows = np.array([slot.row for unit in loop.stage.order.batch(number) for slot in unit])
        total += training_flops(model, amount_of(cast(EncodedDataset, loop.stage.data), rows), recompute=False)
    return total


def best_matmul(args: Namespace) -> float:
    """Return the FLOP/s of the fastest of some square matrix products in the precision of the run."""
    kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
    best = 0.0
    for size in (*MATMULS, 8192) if args.device == "cuda" else MATMULS:
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
        "activation_checkpointing": args.activation_checkpointing,
        "max_steps": args.steps + args.warm_up + 1,
        "learning_rate": 1e-4,
    }
    loops: dict[str, TrainingLoop] = {}
    for layout in args.layouts:
        options = TrainingOptions(**shared, **LAYOUTS[layout])
        for name, objective in OBJECTIVES.items():
            if args.random and loops:
                loop = copy(next(iter(loops.values())))
                loop.setup = replace(loop.setup, stage=replace(loop.stage, objective=objective()))
            else:
                model = model_of(args)
                if layout == LORA:
                    add_adapters(model, ADAPTERS, seed=0)
                stage = ntp_stage(model, data, options, world, directory)
                loop = TrainingLoop(replace(stage, name=name, objective=objective()), world)
            loops[f"{name}, {layout}"] = loop
    return loops


def model_of(args: Namespace) -> PreTrainedModel:
    if not args.random:
        return load_model(args.model)
    with torch.device(args.device):
        return LlamaForCausalLM(cast(LlamaConfig, model_config(args.model)))


def results(seen: dict[str, list[dict[str, float]]], loops: dict[str, TrainingLoop], args: Namespace) -> dict:
    def each(name: str, key: str) -> list[float]:
        return [turn[key] for turn in seen[name]]

    def ratio(a: str, b: str, key: str = "seconds") -> dict[str, float]:
        return spread([x / y for x, y in zip(each(a, key), each(b, key), strict=True)])

    def speed(name: str) -> float:
        return sum(each(name, "tokens")) / sum(each(name, "seconds"))

    layouts, peak = args.layouts, best_matmul(args)
    lora = {name: ADAPTERS if LORA in name else LoraOptions() for name in loops}
    rates = {name: flops_of(loop, args, lora[name]) / sum(each(name, "seconds")) for name, loop in loops.items()}
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
        "gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "mfu": {name: round(rate / peak, 4) for name, rate in rates.items()},
        **({"peak_gib": {name: round(max(each(name, "peak_gib")), 3) for name in seen}} if args.random else {}),
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
    options.add_argument("--activation_checkpointing", action="store_true")
    options.add_argument("--random", action="store_true", help="--model needs no weights; a Llama, in one layout only")
    options.add_argument("--layouts", nargs="+", default=DEFAULT, choices=list(LAYOUTS))
    args = parse(options, QUICK)
    torch.set_num_threads(args.threads)
    world = World(device=torch.device(args.device))
    with tempfile.TemporaryDirectory() as directory:
        loops = make_loops(args, world, Path(directory))
        stage = next(iter(loops.values())).stage
        contestants = {name: step_of(loop) for name, loop in loops.items()}
        if args.random:  # a module for scoring alone would take the gradients from the weights
            module = next(iter(loops.values())).module
        else:
            module = training_module(load_model(args.model), stage.options, precision=args.precision, world=world)
        contestants["scoring"] = scoring_of(stage, module)
        found = results(alternate(contestants, args), loops, args)
        found["a step, profiled"] = {name: profiled(step_of(loop), args) for name, loop in loops.items()}
    chosen = "" if args.layouts == DEFAULT else "-".join(args.layouts).replace(",", "").replace(" ", "-")
    publish("step", args, found, variant=chosen, packages=("transformers",))


if __name__ == "__main__":
    main()
