"""Time and peak memory of the fused loss against the naive formula and the fused heads of others.

    python benchmarks/loss.py                                                    2,048 rows of SmolLM2-135M's head, fp32
    python benchmarks/loss.py --head llama-3.2-1b --rows 1024
    python benchmarks/loss.py --head llama-3.1-8b --rows 8192 --dtype bfloat16 --device cuda

Forward and backward of the mean loss to hidden states and head. The contestants take turns in random order, round after
round, so that a busy machine disturbs them alike; each one's memory, above the memory before, is that of the GPU's
allocator, or on a CPU of a process of its own. On a GPU its clock (MHz) and power (watts) in these turns are noted. The
heads of torch, TRL, Liger (also with sums in float32, as ours has them) and cut-cross-entropy take part if they are
there; what raises an error, as where memory does not suffice, is named and left out. `gemm` is the three matmuls alone
that every head needs (logits, their way back to hidden states and head) at our chunk size: no loss can be faster. The
logits of `naive_ntp` are float32, as those of transformers.
Prints one JSON object and writes it to benchmarks/results/<date>-loss-<head>-<dtype>-<device>.json.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import Card, held, in_turns, rounded  # noqa: E402
from benchmarks.report import parse, parser, publish, spread  # noqa: E402
from sftmix.functional import chunked_loss, reference_sft_loss, sft_loss  # noqa: E402
from sftmix.functional.fused import default_chunk_size  # noqa: E402
from sftmix.training.memory import PeakMemory  # noqa: E402

HEADS = {  # hidden size, vocabulary (from the configurations of the models on the hub)
    "smollm2-135m": (576, 49_152),
    "gemma3-270m": (640, 262_144),
    "qwen2.5-0.5b": (896, 151_936),
    "llama-3.2-1b": (2048, 128_256),
    "llama-3.1-8b": (4096, 128_256),
    "4096x151936": (4096, 151_936),
    "2048x248320": (2048, 248_320),
}
VARIANTS = ["gemm", "naive_sftmix", "naive_ntp", "torch_ntp", "trl_ntp", "liger_ntp", "liger_float32_ntp", "cce_ntp"]
VARIANTS += ["chunked_ntp", "fused_ntp", "fused_sftmix"]
LIGERS = ("liger_ntp", "liger_float32_ntp")
PACKAGES = {"trl_ntp": "trl", "cce_ntp": "cut-cross-entropy", **dict.fromkeys(LIGERS, "liger-kernel")}
CE = partial(F.cross_entropy, reduction="none")
QUICK = {"rows": 64, "rounds": 2}
TRL_TILE = 32_768
"""Vocabulary columns of a tile, as in the trainers of TRL 1.16."""


class Inputs(NamedTuple):
    """hidden [T, D] and weight [V, D] with gradients, labels [T], pairs [M, 2] of the rows that have a partner."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    pairs: torch.Tensor
    lam: torch.Tensor


def make_inputs(args: argparse.Namespace, rows: int) -> Inputs:
    torch.manual_seed(0)
    kind = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    width, vocabulary = HEADS[args.head]
    hidden = torch.randn(rows, width, **kind).requires_grad_()
    weight = (torch.randn(vocabulary, width, **kind) / width**0.5).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), device=args.device)
    many = int(rows * args.paired / 2)
    pairs = torch.randperm(rows, device=args.device)[: 2 * many].view(2, many).T.contiguous()
    return Inputs(hidden, weight, labels, pairs, torch.rand(many, device=args.device))


def trl_ntp(given: Inputs) -> torch.Tensor:
    from trl.kernels import ChunkedLogProbFunction

    hidden, weight, labels = given[:3]
    return -ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, TRL_TILE, None, 1.0, ())[0].mean()


def liger_ntp(given: Inputs, **options: Any) -> torch.Tensor:
    """Liger's sums of the head's gradient have its dtype, ours are float32: as its accum_dtype makes them."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(**options)(given.weight, given.hidden, given.labels)


def cce_ntp(given: Inputs) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(given.hidden, given.weight, given.labels)


def ours(function: Callable, given: Inputs, chunk_size: int | None, *, mixed: bool) -> torch.Tensor:
    many, rows = len(given.pairs) if mixed else 0, len(given.labels)
    ones = torch.ones(rows, device=given.labels.device)
    weights = {"row_weight": ones, "pair_weight": 0.2 * ones[:many], "chunk_size": chunk_size}
    return function(*given[:3], given.pairs[:many], given.lam[:many], **weights).loss / rows


def gemm(given: Inputs, chunk_size: int | None) -> None:
    """Run the matmuls of our fused head, and nothing else."""
    hidden, weight = given.hidden.detach(), given.weight.detach()
    size = min(len(hidden), chunk_size or default_chunk_size(len(weight), weight.device))
    logits = weight.new_empty(size, len(weight))
    dw = torch.empty_like(weight)
    for number, h in enumerate(hidden.split(size)):
        torch.mm(h, weight.T, out=logits[: len(h)])
        torch.mm(logits[: len(h)], weight)
        dw.addmm_(logits[: len(h)].T, h, beta=min(number, 1))


def installed(name: str) -> bool:
    return find_spec(PACKAGES[name].replace("-", "_")) is not None


def contestants(args: argparse.Namespace, rows: int) -> dict[str, Callable[[], None]]:
    """Return functions that run forward and backward once, on the same inputs; only those that can run here."""
    given = make_inputs(args, rows)
    losses = {
        "naive_sftmix": lambda: ours(reference_sft_loss, given, None, mixed=True),
        "naive_ntp": lambda: F.cross_entropy(F.linear(given.hidden, given.weight).float(), given.labels),
        "torch_ntp": lambda: F.linear_cross_entropy(given.hidden, given.weight, given.labels),
        "trl_ntp": lambda: trl_ntp(given),
        "liger_ntp": lambda: liger_ntp(given),
        "liger_float32_ntp": lambda: liger_ntp(given, accum_dtype=torch.float32),
        "cce_ntp": lambda: cce_ntp(given),
        "chunked_ntp": lambda: chunked_loss(given.hidden, CE, given.labels, weight=given.weight).loss / rows,
        "fused_ntp": lambda: ours(sft_loss, given, args.chunk_size, mixed=False),
        "fused_sftmix": lambda: ours(sft_loss, given, args.chunk_size, mixed=True),
    }
    missing = {name: not installed(name) for name in PACKAGES}
    missing["torch_ntp"] = not hasattr(F, "linear_cross_entropy")
    if args.device != "cuda":
        missing |= dict.fromkeys((*LIGERS, "cce_ntp"), True)

    def synchronised(run: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()

        return timed

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            given.hidden.grad = given.weight.grad = None
            loss().backward()

        return run

    made = {"gemm": lambda: gemm(given, args.chunk_size), **{name: step(loss) for name, loss in losses.items()}}
    return {name: synchronised(made[name]) for name in args.variants if not missing.get(name)}


def measure_time(args: argparse.Namespace, card: Card) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Return the wall and CPU seconds of each variant, round after round, and the errors of those that cannot run."""
    variants, errors = contestants(args, args.rows), dict[str, str]()
    for name, run in list(variants.items()):
        try:
            run()
        except Exception as error:
            errors[name] = repr(error)[:200]
            del variants[name]
    rounds: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "cpu_seconds": []} for name in variants}
    for _, name, _, took in in_turns(variants, card, args.rounds):
        for key, value in took.items():
            rounds[name][key].append(value)
    return rounds, errors


def summary(rounds: dict[str, list[float]]) -> dict[str, float]:
    seconds = rounds["seconds"]
    found = {"seconds": median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds)}
    return rounded({**found, "cpu_seconds": median(rounds["cpu_seconds"])}, 6)


def peak_memory(args: argparse.Namespace, name: str) -> float:
    """Return the MiB that a variant needs at its peak, beyond its inputs; on a CPU, call it once in a process."""
    contestants(args, 4)[name]()  # libraries load and make their buffers now
    run = contestants(args, args.rows)[name]
    before, memory = held(args.device), PeakMemory(torch.device(args.device))
    run()
    return (memory.bytes() - before) / 2**20


def ratio(rounds: dict[str, dict[str, list[float]]], peaks: dict[str, float], a: str, b: str) -> dict[str, Any]:
    """Return medians of the ratios round by round, and quartiles of those of seconds (`spread`).

    seconds_min  the ratio of the smallest times
    """
    made: dict[str, Any] = {}
    for key in ("cpu_seconds", "seconds"):
        each = [x / y for x, y in zip(rounds[a][key], rounds[b][key], strict=True)]
        made[key] = median(each)
    made["spread"] = spread(each)
    made["seconds_min"] = min(rounds[a]["seconds"]) / min(rounds[b]["seconds"])
    return rounded({**made, "peak_mib": peaks[a] / peaks[b]}, 3)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--head", choices=HEADS, default="smollm2-135m")
    options.add_argument("--rows", type=int, default=2048)
    options.add_argument("--paired", type=float, default=0.8, help="share of the rows that are in a pair")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--chunk_size", type=int, default=None)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    options.add_argument("--memory_of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parse(options, QUICK)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_memory(args, args.memory_of))
        return

    peaks: dict[str, float] = {}
    with Card(args.device) as card:
        rounds, errors = measure_time(args, card)
    for name in rounds:
        if args.device == "cuda" or args.quick:
            peaks[name] = peak_memory(args, name)
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[name] = float(output.split()[-1])
    results = {
        name: {**summary(rounds[name]), "peak_mib": round(peaks[name], 1), **card.figures(name)} for name in rounds
    }
    compared = [("fused_sftmix", other) for other in results if other != "fused_sftmix"]
    compared += [("fused_ntp", other) for other in results if other.endswith("_ntp") and other != "fused_ntp"]
    figures: dict[str, Any] = {"results": results, "errors": errors}
    figures |= {f"{a} / {b}": ratio(rounds, peaks, a, b) for a, b in compared if a in results}
    there = sorted({package for name, package in PACKAGES.items() if installed(name)})
    publish("loss", args, figures, variant=f"{args.head}-{args.dtype}", packages=there)


if __name__ == "__main__":
    main()
