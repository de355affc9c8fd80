"""In memory and small: rows of random tokens, a random model, a fixed order."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from sftmix.batches.order import Unit
from sftmix.components import NTP, Callback
from sftmix.options import CheckpointOptions, TrainingOptions
from sftmix.ranks.world import World
from sftmix.testing.strategies import RowsInMemory, rows_in_memory
from sftmix.training.loop import Stage
from sftmix.training.scoring import Scorer
from sftmix.training.step import StepSetup

VOCABULARY = 61


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


def rounding(values: torch.Tensor, sums: int) -> float:
    """How far two ways to compute `values` may be apart if each adds up to `sums` numbers of their size, one by one.

    The order of such sums is the CPU's and its libraries' own, so one machine's difference says nothing of another's.
    """
    return sums * torch.finfo(values.dtype).eps * float(values.abs().max())


@torch.no_grad()
def own_logits(model, rows) -> list[tuple[np.ndarray, np.ndarray]]:
    """(logits [T, V] in float64, labels [T]) of the response tokens of each row, by the model itself, one at a time."""
    found = []
    for e in rows:
        z = model(input_ids=torch.from_numpy(e.input_ids).long()[None]).logits[0].double().numpy()
        at = np.flatnonzero(e.target[1:]) + 1
        found.append((z[at - 1], e.input_ids[at]))
    return found


def own_nll(model, rows) -> list[np.ndarray]:
    """The NLL [T] of the response tokens of each row: the textbook formula, on one example at a time."""
    logits = own_logits(model, rows)
    return [-torch.from_numpy(z).log_softmax(-1).numpy()[np.arange(len(y)), y] for z, y in logits]


@dataclass(frozen=True)
class FixedOrder:
    """Global batches in a given order, with the interface of `sftmix.batches.order.TrainingOrder`."""

    batches: list[list[Unit]]

    @property
    def total_steps(self) -> int:
        return len(self.batches)

    @property
    def rows(self) -> np.ndarray:
        return np.unique([slot.row for batch in self.batches for unit in batch for slot in unit])

    def batch(self, step: int) -> list[Unit]:
        return self.batches[step]

    def epoch_of(self, step: int) -> int:
        return 0

    @property
    def ends(self) -> list[int]:
        return [len(self.batches)]


def toy_stage(
    directory: Path, batches: Sequence[list[Unit]], *, options: dict[str, Any] | None = None, **given
) -> Stage:
    """NTP on the batches; with a learning rate so small that the weights stay as they are to the last but few bits."""
    training = {"learning_rate": 1e-14, "weight_decay": 0.0, "warmup_ratio": 0.0, "schedule": "constant"}
    training |= {"max_grad_norm": 0.0, "micro_batch_size": 2, **(options or {})}
    stage = {"name": "train", "model": toy_model(), "objective": NTP(), "checkpoint": CheckpointOptions(every=0)}
    stage |= {"order": FixedOrder(list(batches)), "directory": directory, "seed": 0, "scorer": Scorer(world=World())}
    return Stage(options=TrainingOptions(**training), **stage | given)


def toy_setup(module, *, optimizer=None, precision="fp32", world=None, **given) -> StepSetup:
    """What a step needs, in float32 on one process."""
    stage = {"data": toy_rows([]), "perturbation": None, "pad_id": 0, "seed": 5, "order": FixedOrder([[]] * 9)}
    return StepSetup(SimpleNamespace(**stage | given), module, optimizer, precision, world or World())


class FakeRank(World):
    """A rank among those that are not there: its sums are its own, and those of all."""

    def sum(self, values):
        return [float(value) for value in values]


class Answers(TorchDispatchMode):
    """Fake tensors that answer each question of the host: 1."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return 1 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def metrics_of(directory: Path) -> list[dict]:
    """The metrics of a stage, step by step."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


class Interrupt(Callback):
    """SIGTERM after a step, as a scheduler sends it."""

    gives = frozenset()

    def __init__(self, *, step: int):
        self.step = step

    def on_step_end(self, state):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
