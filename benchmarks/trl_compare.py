"""Ours against TRL's SFTTrainer: same weights, token ids, labels, global batch, epochs, schedule and precision.

    python benchmarks/trl_compare.py                           base-7m on 480 Alpaca rows, every contestant, 3 epochs
    python benchmarks/trl_compare.py --quick

Contestants (see contestants.py; they take turns in random order, step by step, each in a process of its own):
    trl_default   SFTConfig as it comes, with its own precision and checkpointing: not comparable, but typical
    trl_random    the same in our precision and without checkpointing: random batches
    trl_grouped   and with train_sampling_strategy group_by_length
    trl_liger     the same, packed to max_length, with Liger's kernels; skipped without a GPU, Liger or flash attention
    trl_best      and with what is fastest on the device: CPU smaller micro-batches; CUDA padding_free
    ours_ntp      NTP, in the order of SFTMix
    ours_sftmix   SFTMix on random halves: a reference for the halves costs extra (pipeline.py)

Speed is real tokens per second of whole epochs, so every contestant has done the same work; one value per epoch. Losses
are the means of ten steps, as TRL logs them: of NTP's term, without Mixup. On a GPU its clock and power are noted.
"""

import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contestants import OURS, TRL, contestant, missing  # noqa: E402
from benchmarks.measure import Card, in_turns  # noqa: E402
from benchmarks.report import parse, parser, publish, spread  # noqa: E402
from benchmarks.stages import random_llama  # noqa: E402

SHARED = ROOT.parent / "shared"
NLLS = ("train_nll", "held_out_nll")
"""What a contestant reports with held-out rows alone."""
QUICK = {"limit": 64, "held_out": 16, "epochs": 1, "max_length": 128}


def race(args: Namespace, card: Card) -> tuple[dict[str, list[dict[str, float]]], dict[str, dict[str, Any]]]:
    """Return the figures of every step of every contestant, and the last message of each."""
    context = get_context("spawn")
    lines, processes = {}, []
    for name in args.contestants:
        lines[name], theirs = context.Pipe()
        processes.append(context.Process(target=contestant, args=(name, theirs, args), daemon=True))
        processes[-1].start()
        theirs.close()
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in lines}

    def turn(line: Connection) -> tuple[dict[str, float], bool]:
        line.send("go")
        return line.recv()

    turns = {name: partial(turn, line) for name, line in lines.items()}
    try:
        for _, name, (figures_of_step, again), _ in in_turns(turns, card):
            steps[name].append(figures_of_step)
            if not again:
                del turns[name]
    except (EOFError, OSError):  # one has crashed; the others wait, and take SIGTERM for a wish to stop after a step
        for process in processes:
            process.kill()
        raise
    figures = {}
    for (name, line), process in zip(lines.items(), processes, strict=True):
        line.send("end")
        figures[name] = line.recv()
        process.join()
    return steps, figures


def by_epoch(steps: Sequence[Mapping[str, float]], key: str, epochs: int) -> list[float]:
    size = len(steps) // epochs
    return [sum(step[key] for step in steps[k * size : (k + 1) * size]) for k in range(epochs)]


def summary(steps: list[dict[str, float]], figures: dict[str, Any], epochs: int) -> dict[str, Any]:
    tokens = figures["tokens"]
    return {
        "real_tokens_per_second": spread([tokens / s for s in by_epoch(steps, "seconds", epochs)], 1),
        "real_tokens_per_cpu_second": spread([tokens / s for s in by_epoch(steps, "cpu_seconds", epochs)], 1),
        "seconds_per_step": spread([step["seconds"] for step in steps]),
        "real tokens / slots": round(tokens / figures["slots"], 4),
        **{key: round(figures[key], 1) for key in ("peak_mib_above_the_loaded_model", "peak_mib")},
        **{key: round(figures[key], 5) for key in NLLS if key in figures},
        "losses": {step: round(loss, 4) for step, loss in figures["losses"].items()},
    }


def against(ours: str, theirs: str, steps: dict, found: dict[str, dict[str, Any]], epochs: int) -> dict[str, Any]:
    """Return ours against theirs: faster is above 1, less memory is below 1, NLLs as differences in nats."""
    made: dict[str, Any] = {}
    for key in ("seconds", "cpu_seconds"):
        each = [by_epoch(steps[name], key, epochs) for name in (theirs, ours)]
        made[f"speed by {key}"] = spread([a / b for a, b in zip(*each, strict=True)])
    for key in ("peak_mib_above_the_loaded_model", "peak_mib"):
        made[key] = round(found[ours][key] / found[theirs][key], 3)
    for key in filter(found[ours].__contains__, NLLS):
        made[key] = round(found[ours][key] - found[theirs][key], 5)
    return made


def variant(options: ArgumentParser, args: Namespace) -> str:
    """Return the settings that are not the default, so that results of one day lie side by side."""
    told = ("vocabulary", "trl_micro_batch_size", "micro_batch_size", "precision")
    return "-".join(f"{k}-{getattr(args, k)}" for k in told if getattr(args, k) != options.get_default(k))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=str(SHARED / "models" / "base-7m"))
    options.add_argument("--rows", default=str(SHARED / "data" / "alpaca" / "alpaca_8k.json"))
    options.add_argument("--vocabulary", type=int, help="train a random Llama with so many rows of the head instead")
    options.add_argument("--limit", type=int, default=480, help="training rows, a multiple of the global batch")
    options.add_argument("--held_out", type=int, default=160, help="rows after them, for the held-out NLL")
    options.add_argument("--max_length", type=int, default=512)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--global_batch_size", type=int, default=32)
    options.add_argument("--micro_batch_size", type=int, help="ours; default: what it chooses")
    options.add_argument("--trl_micro_batch_size", type=int, default=8, help="of TRL but trl_best; its default")
    options.add_argument("--trl_best_micro_batch_size", type=int, default=4)
    options.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options.add_argument("--learning_rate", type=float, default=1e-4)
    options.add_argument("--contestants", nargs="+", default=[*TRL, *OURS], choices=[*TRL, *OURS])
    args = parse(options, QUICK)
    skipped = {name: reason for name in args.contestants if (reason := missing(name, args))}
    args.contestants = [name for name in args.contestants if name not in skipped]
    if args.limit % args.global_batch_size:
        options.error(f"--limit {args.limit} is not a multiple of --global_batch_size {args.global_batch_size}")
    with tempfile.TemporaryDirectory() as directory:
        wide = random_llama(args.model, Path(directory), vocabulary=args.vocabulary) if args.vocabulary else args.model
        with Card(args.device) as card:
            steps, figures = race(Namespace(**{**vars(args), "model": wide}), card)
    found = {
        name: {**summary(steps[name], figures[name], args.epochs), **card.figures(name)} for name in args.contestants
    }
    pairs = [(ours, theirs) for ours in OURS for theirs in TRL if {ours, theirs} <= set(found)]
    ratios = {f"{ours} / {theirs}": against(ours, theirs, steps, found, args.epochs) for ours, theirs in pairs}
    results = {"contestants": found, "skipped": skipped, "ratios": ratios}
    publish("trl_compare", args, results, variant=variant(options, args), packages=("transformers", "trl"))


if __name__ == "__main__":
    main()
