"""A training step with Mixup against one without, and three ways to lay out a micro-batch.

    python benchmarks/step.py --model DIR --rows FILE
    python benchmarks/step.py --quick                a trial of a few minutes with one thread, not kept

Six training loops take turns, in random order in each round, on the same global batches: NTP and SFTMix, each with
padded micro-batches, padded in groups of similar length (the default on a CPU), and in one row without padding (the
default on a GPU whose attention does no work between examples). NTP is paired as SFTMix pairs, so it has the same
order. A seventh takes its turn: scoring a part of the rows. With `--layouts "length groups" "length groups, compiled"`
the first layout is compared with compiled decoder layers; `--warm_up` rounds should then be enough to compile them;
with `"length groups, LoRA"`, with adapters of rank 16 (their memory: estimate.py). The layouts `defaults` and `LoRA,
...` set nothing: they have what a run decides, which is printed and reported (`chosen`), compiled layers by the
`--total` of the stage's steps. With `--random` the weights are random, and all loops of a layout train the same ones
with one optimizer, so that a large model fits; `defaults, deterministic` shares those of `defaults`.

Reports seconds per step, ratios step by step, real tokens per second and per slot, and MFU: the FLOPs that the real
tokens need (causal attention, head on response tokens) as a share of what the best matrix product reaches on this
device, in this run; on a GPU also its clock and power in the turns of each. One more step of each loop is profiled:
what it calls that may wait for the GPU, what is busiest.
"""

import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import Card, in_turns  # noqa: E402
from benchmarks.report import parse, parser, publish, spread  # noqa: E402
from benchmarks.stages import load_rows, ntp_stage, tokens_and_slots  # noqa: E402
from sftmix.batches.order import RowSubset  # noqa: E402
from sftmix.components.objectives import NTP, SFTMix  # noqa: E402
from sftmix.data import EncodedDataset  # noqa: E402
from sftmix.model.adapters import add_adapters  # noqa: E402
from sftmix.model.layers import keep_in_bfloat16  # noqa: E402
from sftmix.model.load import load_model, model_config  # noqa: E402
from sftmix.model.packing import attention_of  # noqa: E402
from sftmix.options import LoraOptions, TrainingOptions  # noqa: E402
from sftmix.ranks.world import World  # noqa: E402
from sftmix.tools.estimate.model import FakeModel, training_flops  # noqa: E402
from sftmix.tools.estimate.work import amount_of  # noqa: E402
from sftmix.training.choices import decide  # noqa: E402
from sftmix.training.loop import Stage, TrainingLoop  # noqa: E402
from sftmix.training.machine import DECIDED, WORKSPACE, adding_in_order  # noqa: E402
from sftmix.training.memory import PeakMemory  # noqa: E402
from sftmix.training.parallel import training_module, unwrap, without_cudnn_if_padded  # noqa: E402

SHARED = ROOT.parent / "shared"
QUICK = {"limit": 160, "max_length": 128, "steps": 2}
ADAPTERS, IN_ORDER = LoraOptions(r=16), ", deterministic"
OWN: dict[str, Any] = {"micro_batch_size": None, "activation_checkpointing": "auto"}
"""Nothing of the layout is set: a run decides."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"length_groups": 1, "padding_free": False},
    "length groups": {"padding_free": False},
    "padding-free": {"padding_free": True},
    "length groups, compiled": {"padding_free": False, "compile": True},
    "length groups, LoRA": {"padding_free": False},
    "defaults": OWN,
    f"defaults{IN_ORDER}": {**OWN, "deterministic": True},
    "LoRA, base float32": OWN,
    "LoRA, base bfloat16": OWN,
}
DEFAULT = ["padded", "length groups", "padding-free"]
OBJECTIVES = {"ntp": NTP, "sftmix": SFTMix}
SCORED = 320
Seen = dict[str, list[dict[str, float]]]
MATMULS = (1024, 2048, 4096)
WAITS = ["aten::item", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync"]
WAITS += ["cudaLaunchKernel"]


def take_turns(contestants: dict[str, Callable[[], float]], args: Namespace, card: Card) -> Seen:
    """Return seconds, CPU seconds and tokens of each contestant's turns, without those of the first rounds."""
    seen: Seen = {name: [] for name in contestants}
    device = torch.device(args.device)

    def with_peak(run: Callable[[], float]) -> tuple[float, int]:
        memory = PeakMemory(device)
        return run(), memory.bytes()

    watched = {name: partial(with_peak, run) for name, run in contestants.items()}
    for number, name, (tokens, peak), took in in_turns(watched, card, args.steps + args.warm_up):
        if number >= args.warm_up:
            seen[name].append({**took, "tokens": tokens, "peak_gib": peak / 2**30})
    return seen


def step_of(loop: TrainingLoop) -> Callable[[], float]:
    def run() -> float:
        ordered = adding_in_order(loop.stage.options.deterministic)
        with ordered, without_cudnn_if_padded(loop.module, loop.stage.data.lengths):
            metrics = loop.advance()
        if loop.world.device.type == "cuda":
            torch.cuda.synchronize()
        return metrics["tokens"]

    return run


def begun(stage: Stage, world: World) -> TrainingLoop:
    """Return a loop that has decided what a run decides before its first step."""
    loop = TrainingLoop(stage, world)
    decide(loop.setup, (), lambda line: print(f"{stage.name}: {line}", file=sys.stderr))
    loop.stage = loop.setup.stage
    return loop


def chosen(loop: TrainingLoop) -> dict[str, Any]:
    """Return what was asked of the layout or decided in the place of auto."""
    options, module = loop.stage.options, unwrap(loop.module)
    return {
        **{name: getattr(options, name) for name in (*DECIDED, "micro_batch_size", "deterministic")},
        "padding_free": module.padding_free,
        "attention": attention_of(module.model),
        "precision": loop.setup.precision,
        "fused": loop.optimizer.defaults.get("fused"),
    }


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
    for size in (*MATMULS, 8192) if args.device == "cuda" else MATMULS[: 1 if args.quick else None]:
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
        "max_steps": max(args.total, args.steps + args.warm_up + 1),
        "learning_rate": 1e-4,
    }
    loops: dict[str, TrainingLoop] = {}
    for layout in args.layouts:
        options = TrainingOptions(**(shared | LAYOUTS[layout]))
        twin = f"ntp, {layout.removesuffix(IN_ORDER)}"
        for name, objective in OBJECTIVES.items():
            if args.random and twin in loops:
                loop = copy(loops[twin])
                same = replace(loop.stage.options, deterministic=options.deterministic)
                loop.stage = replace(loop.stage, objective=objective(), options=same)
                loop.setup = replace(loop.setup, stage=loop.stage)
            else:
                model = model_of(args)
                if "LoRA" in layout:
                    add_adapters(model, ADAPTERS, seed=0)
                if "bfloat16" in layout:
                    keep_in_bfloat16(model, trains=True)
                stage = ntp_stage(model, data, options, world, directory)
                loop = begun(replace(stage, name=name, objective=objective()), world)
            loops[f"{name}, {layout}"] = loop
    return loops


def model_of(args: Namespace) -> PreTrainedModel:
    if not args.random:
        return load_model(args.model)
    torch.manual_seed(0)
    with torch.device(args.device):
        return LlamaForCausalLM(cast(LlamaConfig, model_config(args.model)))


def results(seen: Seen, loops: dict[str, TrainingLoop], args: Namespace, card: Card) -> dict[str, Any]:
    def each(name: str, key: str) -> list[float]:
        return [turn[key] for turn in seen[name]]

    def ratio(a: str, b: str, key: str = "seconds") -> dict[str, float]:
        return spread([x / y for x, y in zip(each(a, key), each(b, key), strict=True)])

    def speed(name: str) -> float:
        return sum(each(name, "tokens")) / sum(each(name, "seconds"))

    layouts, peak = args.layouts, best_matmul(args)
    lora = {name: ADAPTERS if "LoRA" in name else LoraOptions() for name in loops}
    rates = {name: flops_of(loop, args, lora[name]) / sum(each(name, "seconds")) for name, loop in loops.items()}
    pairs = {layout: (f"sftmix, {layout}", f"ntp, {layout}") for layout in layouts}
    first = f"ntp, {layouts[0]}"
    return {
        "chosen": {layout: chosen(loops[ntp]) for layout, (_, ntp) in pairs.items()},
        "clock and power": {name: figures for name in seen if (figures := card.figures(name))},
        "last loss": {name: loop.done.loss for name, loop in loops.items() if loop.done is not None},
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
    options.add_argument("--random", action="store_true", help="--model needs no weights; a Llama")
    options.add_argument("--layouts", nargs="+", default=DEFAULT, choices=list(LAYOUTS))
    options.add_argument(
        "--total", type=int, default=0, help="steps that the stages have, if more: compile auto counts"
    )
    args = parse(options, QUICK)
    if any(layout.endswith(IN_ORDER) for layout in args.layouts):
        os.environ.setdefault(WORKSPACE, ":4096:8")  # before CUDA starts
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
        with Card(args.device) as card:
            seen = take_turns(contestants, args, card)
        found = results(seen, loops, args, card)
        found["a step, profiled"] = {name: profiled(step_of(loop), args) for name, loop in loops.items()}
    chosen = "" if args.layouts == DEFAULT else "-".join(args.layouts).replace(",", "").replace(" ", "-")
    publish("step", args, found, variant=chosen, packages=("transformers",))


if __name__ == "__main__":
    main()
