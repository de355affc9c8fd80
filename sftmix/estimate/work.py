"""What a configuration will do, found by letting its reference and its order say it: nothing is trained or scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from sftmix.data import EncodedDataset
from sftmix.data.batching import Unit, length_groups
from sftmix.dynamics import checkpoint_steps
from sftmix.estimate.machine import Machine
from sftmix.measurement import sample_rows
from sftmix.options import LoraOptions, ReferenceModel, ReferenceTraining, TrainingOptions, reference_lora
from sftmix.reference_run import ReferenceRun, inherit
from sftmix.rng import generator
from sftmix.run_context import RunContext
from sftmix.training.order import TrainingOrder
from sftmix.training.window import deal
from sftmix.types import Rows, TrainingDynamics

SAMPLED_STEPS = 100
"""Steps whose batches are laid out to find the largest micro-batch."""

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tokens:
    """How much goes through a model: tokens, response tokens among them, and the sum of squared lengths."""

    all: float
    targets: float
    squares: float

    @classmethod
    def of(cls, data: EncodedDataset, rows: Rows | None = None, times: float = 1.0) -> Tokens:
        """Of a data set or some of its rows, `times` over."""
        lengths, targets = data.lengths, data.n_targets
        if rows is not None:
            lengths, targets = lengths[rows], targets[rows]
        squares = (lengths.astype(np.float64) ** 2).sum()
        return cls(times * float(lengths.sum()), times * float(targets.sum()), times * float(squares))

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.all + other.all, self.targets + other.targets, self.squares + other.squares)


NOTHING = Tokens(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The largest one: (rows, width) of its segments, its response tokens, whether others of its step precede it."""

    segments: tuple[Shape, ...]
    targets: int
    accumulated: bool

    @property
    def slots(self) -> int:
        return sum(rows * width for rows, width in self.segments)


@dataclass(frozen=True, slots=True)
class Work:
    """One stage: a model with the tokens it is trained on and those it only reads.

    options, batch  None where nothing is trained
    """

    name: str
    model_path: str
    lora: LoraOptions
    trained: Tokens
    read: Tokens
    steps: int
    options: TrainingOptions | None
    batch: MicroBatch | None


class PlannedReference(ReferenceRun):
    """A ReferenceContext that writes down what it is asked for instead of doing it."""

    def __init__(self, run: RunContext, machine: Machine) -> None:
        super().__init__(run)
        self._machine = machine
        self.work: list[Work] = []

    def train_and_score(
        self,
        *,
        model: ReferenceModel | None,
        training: ReferenceTraining | None,
        checkpoints: int | Sequence[float] | Literal["online"],
        token_nll: bool = False,
        response_alone: bool = False,
    ) -> TrainingDynamics:
        config = self._run.config
        model = model or ReferenceModel()
        path, _, data = self.rows_of(model)
        options = inherit(config.training, training)
        order = TrainingOrder(len(data), lambda epoch: None, options=options, seed=0)
        steps = [] if checkpoints == "online" else checkpoint_steps(checkpoints, order.total_steps)
        read = Tokens.of(data, times=len(steps))
        if response_alone:  # without its instruction
            alone = Tokens.of(data, times=len(steps))
            read += Tokens(alone.targets, alone.targets, alone.squares * (alone.targets / max(alone.all, 1)) ** 2)
        lora = reference_lora(config.model, model)
        self.work.append(training_work("reference", (path, lora), data, order, options, self._machine, read))
        return self._nothing(max(len(steps), 1))

    def score_models(self, paths: Sequence[str], **options: Any) -> TrainingDynamics:
        model = ReferenceModel(path=paths[0], template=options["template"], max_length=options["max_length"])
        _, _, data = self.rows_of(model, option="reference")
        passes = Tokens.of(data, times=len(paths))
        self.work.append(Work("reference", paths[0], LoraOptions(), NOTHING, passes, 0, None, None))
        return self._nothing(len(paths))

    def _nothing(self, checkpoints: int) -> TrainingDynamics:
        n = len(self.ids)
        zero = np.zeros((n, checkpoints))
        return TrainingDynamics(self.ids, np.arange(checkpoints), zero, np.ones(n, np.int64), zero.astype(np.int64))


def target_work(run: RunContext, machine: Machine, *, paired: bool) -> list[Work]:
    """The target's stage, and the NTP baseline's where there is one."""
    config, data = run.config, run.data.train
    rows = len(data)

    def pairs_of(epoch: int) -> Rows | None:
        """Some pairs: which ones makes no difference to the cost."""
        order = generator(config.seed, "estimate", epoch).permutation(rows)
        return order[: rows // 2 * 2].reshape(-1, 2).astype(np.int64) if paired else None

    order = TrainingOrder(rows, pairs_of, options=config.training, seed=config.seed)
    read = Tokens.of(data, sample_rows(data.ids), times=2)
    if run.data.eval is not None:  # before, after each epoch, and once more for calibration
        read += Tokens.of(run.data.eval, times=2 + len(order.ends))
    model = (config.model.path, config.model.lora)
    train = training_work("train", model, data, order, config.training, machine, read)
    return [train, replace(train, name="baseline")] if config.with_baseline else [train]


def training_work(
    name: str,
    model: tuple[str, LoraOptions],
    data: EncodedDataset,
    order: TrainingOrder,
    options: TrainingOptions,
    machine: Machine,
    read: Tokens,
) -> Work:
    """The Work of one training stage."""
    passes = order.total_steps / math.ceil(len(data) / options.global_batch_size)
    batch = largest_micro_batch(data, order, options, machine)
    return Work(name, *model, Tokens.of(data, times=passes), read, order.total_steps, options, batch)


def largest_micro_batch(
    data: EncodedDataset, order: TrainingOrder, options: TrainingOptions, machine: Machine
) -> MicroBatch:
    """Of some steps spread over the training: the one with the most token slots, which need the most memory."""
    one_row, found = options.padding_free is True, []
    for step in np.unique(np.linspace(0, order.total_steps - 1, SAMPLED_STEPS).astype(int)).tolist():
        batch, ranks, device = order.batch(step), machine.count, machine.device
        steps = deal(batch, data.lengths, options, ranks=ranks, device=device, padding_free=one_row)
        found += [
            _laid_out(rank, 0 if one_row else one.n_segments, data, len(steps) > 1)
            for one in steps
            for rank in one.ranks
        ]
    return max(found, key=lambda batch: batch.slots)


def _laid_out(units: Sequence[Unit], n_segments: int, data: EncodedDataset, accumulated: bool) -> MicroBatch:
    """n_segments: 0 for all in one row."""
    rows = np.array([slot.row for unit in units for slot in unit])
    lengths = data.lengths[rows].tolist()
    groups = length_groups(lengths, min(n_segments, len(lengths))) if n_segments else []
    segments = tuple((len(group), max(lengths[i] for i in group)) for group in groups) or ((1, sum(lengths)),)
    return MicroBatch(segments, int(data.n_targets[rows].sum()), accumulated)
