"""Growth of time and memory with the number of rows.

    python benchmarks/scale.py                              1,000 to 1,000,000 synthetic rows, some minutes
    python benchmarks/scale.py --quick

Everything that is done per row but training (reading, tokenising, tables, splits, pairs, the order of an epoch,
batches), each size in a process of its own; seconds, MiB at the peak above the memory before, and the exponent of the
growth from the size before: 1 is linear.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import held, rounded, timed  # noqa: E402
from benchmarks.report import parse, parser, publish  # noqa: E402
from benchmarks.stages import write_rows  # noqa: E402
from sftmix.batches.order import TrainingOrder  # noqa: E402
from sftmix.components.confidence import Perplexity, variability  # noqa: E402
from sftmix.components.contracts import check_confidence, check_pairs, check_split  # noqa: E402
from sftmix.components.others.pairings import ConfidenceGapPairs, LengthMatchedPairs  # noqa: E402
from sftmix.components.pairing import RandomPairs  # noqa: E402
from sftmix.components.splitters import LengthMatched, Median, Quantile  # noqa: E402
from sftmix.data import encode_dataset, prepare  # noqa: E402
from sftmix.disk.tables import read_dynamics, read_split, write_dynamics, write_split, write_table  # noqa: E402
from sftmix.measure.confounds import describe_split  # noqa: E402
from sftmix.measure.model import sample_rows  # noqa: E402
from sftmix.model.load import load_model, load_tokenizer  # noqa: E402
from sftmix.options import DataOptions, TrainingOptions  # noqa: E402
from sftmix.ranks.rng import generator  # noqa: E402
from sftmix.ranks.world import World  # noqa: E402
from sftmix.text.encoder import encoder_for  # noqa: E402
from sftmix.training.memory import PeakMemory  # noqa: E402
from sftmix.training.module import TrainingModule  # noqa: E402
from sftmix.training.step import micro_batches  # noqa: E402
from sftmix.types import Scores, TrainingDynamics  # noqa: E402

SHARED = ROOT.parent / "shared"
QUICK = {"sizes": [300, 3000]}
CHECKPOINTS, BATCHES, BATCH = 5, 16, 32


class Log:
    """Seconds, CPU seconds and memory of pieces of work, one after the other."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        before, peak = held("cpu"), PeakMemory(torch.device("cpu"))
        result, took = timed(work)
        self.found[name] = rounded({**took, "mib": (peak.bytes() - before) / 2**20}, 3)
        return result


# ---------------------------------------------------------------------------------------------- rows


def made_up_dynamics(ids: list[str], n_tokens: np.ndarray) -> TrainingDynamics:
    mean = generator(0, "scale").gamma(4.0, 0.5, (len(ids), CHECKPOINTS))
    return TrainingDynamics(
        ids=ids,
        steps=np.arange(1, CHECKPOINTS + 1),
        nll_sum=mean * n_tokens[:, None],
        n_tokens=n_tokens,
        n_correct=np.zeros((len(ids), CHECKPOINTS), dtype=np.int64),
    )


def grow_rows(args: argparse.Namespace, place: Path) -> dict[str, dict[str, float]]:
    """Do everything that a run does per row before and beside its steps; return its figures."""
    log, world = Log(), World()
    write_rows(place / "rows.jsonl", args.size)
    options = DataOptions(train=[str(place / "rows.jsonl")], cache_dir=str(place / "cache"))
    encoder = encoder_for(load_tokenizer(args.model), DataOptions())
    prepared = log("read and prepare", lambda: prepare(options, 0))
    log("tokenise", lambda: encode_dataset(prepared, encoder, max_length=256))
    data = log(
        "load from the cache",
        lambda: encode_dataset(prepare(options, 0), encoder, max_length=256).train,
    )
    log("ids, lengths, labels, columns", lambda: (data.ids, data.lengths, data.n_targets, data.labels, data.columns))
    dynamics = made_up_dynamics(data.ids, data.n_targets)
    log("write dynamics", lambda: write_dynamics(place / "dynamics.parquet", dynamics))
    log("read dynamics, join by id", lambda: read_dynamics(place / "dynamics.parquet").of(data.ids))
    confidence = log("confidence", lambda: check_confidence(Perplexity(), Perplexity().estimate(dynamics), dynamics))
    spread_N = variability(dynamics)
    write = partial(write_table, place / "confidence.parquet", data.ids, confidence=confidence, variability=spread_N)
    log("write confidence", write)
    scores = Scores(data.ids, np.arange(len(data)), confidence, spread_N, data.n_targets)
    for splitter in (Quantile(levels=4), LengthMatched(), Median()):
        split_rows = partial(splitter.split, scores, seed=0)
        split = log(f"split: {type(splitter).__name__}", lambda: check_split(splitter, split_rows(), scores))  # noqa: B023
    log("write split", lambda: write_split(place / "split.parquet", data.ids, split))
    split = log("read split", lambda: read_split(place / "split.parquet")[1])
    log("confounds of the split", lambda: describe_split(place, scores, split))
    for sampler in (LengthMatchedPairs(), ConfidenceGapPairs(), RandomPairs()):
        draw = partial(sampler.pairs, split, scores, epoch=0, seed=0)
        pairs = log(f"pairs: {type(sampler).__name__}", lambda: check_pairs(sampler, draw(), split, scores))  # noqa: B023
    training = TrainingOptions(global_batch_size=BATCH, micro_batch_size=8)
    order = log("order of three epochs", lambda: TrainingOrder(len(data), lambda _: pairs, options=training, seed=0))
    units = log("first step's units", lambda: order.batch(0))
    module = TrainingModule(load_model(args.model))
    batch = partial(micro_batches, units, data, training, world, module, split=split, pad_id=0)
    log(f"{BATCHES} batches", lambda: [batch() for _ in range(BATCHES)])
    log("choose the sample that is measured", lambda: sample_rows(data.ids))
    return log.found


def growth(found: dict[int, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return the figures by piece of work, then by size; with the exponent of each size from the one before."""
    table: dict[str, Any] = {}
    sizes = sorted(found)
    for name in found[sizes[0]]:
        table[name] = {str(size): dict(found[size][name]) for size in sizes}
        for small, large in itertools.pairwise(sizes):
            a, b = (max(found[size][name]["cpu_seconds"], 1e-3) for size in (small, large))
            table[name][str(large)]["exponent"] = round(math.log(b / a) / math.log(large / small), 2)
    return table


# ------------------------------------------------------------------------------------------ processes


def child(args: argparse.Namespace, size: int) -> Any:
    """Return the figures of so many rows, made in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--size", str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=str(SHARED / "models" / "base-7m"), help="whose tokenizer the rows get")
    options.add_argument("--sizes", nargs="+", type=int, default=[1_000, 10_000, 100_000, 1_000_000])
    options.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    args = parse(options, QUICK)
    if args.size:
        torch.set_num_threads(args.threads)
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(grow_rows(args, Path(directory))))
        return
    rows = growth({size: child(args, size) for size in args.sizes})
    del args.size
    publish("scale", args, {"rows": rows}, packages=("datasets", "pyarrow"))


if __name__ == "__main__":
    main()
