"""In memory and small: rows of random tokens, a random model, a fixed order, and runs on two ranks."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sftmix.batches.order import Unit
from sftmix.common.world import start_world
from sftmix.components import NTP
from sftmix.options import CheckpointOptions, TrainingOptions
from sftmix.testing import RowsInMemory, rows_in_memory
from sftmix.training.loop import Stage

VOCABULARY = 61
_ASKED = itertools.count()


ToyRows, toy_rows = RowsInMemory, rows_in_memory


def toy_model(*, dtype: torch.dtype = torch.float64, tied: bool = False, dropout: float = 0.0, seed: int = 0):
    """A random GPT-2 (no operation of it falls back to float32, as Llama's norm does) with logits far from uniform."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).to(dtype)


@dataclass(frozen=True)
class FixedOrder:
    """Global batches in a given order, with the interface of `sftmix.batches.order.TrainingOrder`."""

    batches: list[list[Unit]]

    @property
    def total_steps(self) -> int:
        return len(self.batches)

    def batch(self, step: int) -> list[Unit]:
        return self.batches[step]

    def epoch_of(self, step: int) -> int:
        return 0

    def ends_epoch(self, steps_done: int) -> bool:
        return steps_done == len(self.batches)


def toy_stage(
    directory: Path, batches: Sequence[list[Unit]], *, options: dict[str, Any] | None = None, **given
) -> Stage:
    """NTP on the batches; with a learning rate so small that the weights stay as they are to the last but few bits."""
    training = {"learning_rate": 1e-14, "weight_decay": 0.0, "warmup_ratio": 0.0, "schedule": "constant"}
    training |= {"max_grad_norm": 0.0, "micro_batch_size": 2, **(options or {})}
    stage = {"name": "train", "model": toy_model(), "objective": NTP(), "checkpoint": CheckpointOptions(every=0)}
    stage |= {"order": FixedOrder(list(batches)), "directory": directory, "seed": 0}
    return Stage(options=TrainingOptions(**training), **stage | given)


def logged(directory: Path) -> list[dict]:
    """The metrics of a stage, step by step."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def on_ranks(work: Callable[..., None], *words: object, ranks: int = 2) -> None:
    """Call a module-level `work(world, *words)` on so many ranks (gloo); an error of any fails the test.

    The ranks are forked from a server that has imported what takes long, once for all tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sftmix.pipeline.recipe", "transformers.models.gpt2.modeling_gpt2"])
    port = free_port()
    target = (work.__module__, work.__name__)
    processes = [context.Process(target=_rank, args=(r, ranks, port, target, words)) for r in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # a rank whose peer failed may wait for it
    assert codes == [0] * ranks, f"exit codes of the ranks: {codes} (their tracebacks are on stderr)"


def free_port() -> int:
    """A port that nobody else takes in the moment before the ranks listen on it.

    Below the range from which the system hands out ports, and another stretch of it for each worker of pytest-xdist.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20
    start = 20_000 + 500 * worker
    for port in range(start + next(_ASKED) % 400, start + 500):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", port))
            return port
    raise RuntimeError(f"no free port in {start}..{start + 499}")


def _rank(rank: int, ranks: int, port: int, target: tuple[str, str], words: Sequence[object]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    work = getattr(importlib.import_module(target[0]), target[1])
    with start_world() as world:
        work(world, *words)
