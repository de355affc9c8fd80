"""What a configuration will do, found by letting its reference and its order say it: nothing is trained or scored."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np

from sftmix.batches.collate import collate
from sftmix.batches.deal import deal, token_slots
from sftmix.batches.order import TrainingOrder, fixed, unpaired
from sftmix.common.rng import generator
from sftmix.common.world import World
from sftmix.components.callbacks import Evaluate
from sftmix.components.contracts import check_split
from sftmix.config import RunConfig
from sftmix.data import EncodedDataset
from sftmix.estimate.machine import Machine
from sftmix.measure.model import sample_rows
from sftmix.model.packing import is_skipping
from sftmix.options import LoraOptions, ReferenceModel, TrainingOptions, reference_lora
from sftmix.pipeline.reference import rows_of_reference
from sftmix.pipeline.rows import RunRows
from sftmix.pipeline.stages import inherit
from sftmix.training.dynamics import checkpoint_steps
from sftmix.training.scoring import scoring_tokens
from sftmix.types import Batch, Rows, TrainingDynamics

SAMPLED_STEPS = 100
"""Steps of a training whose batches are dealt."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How much goes through a model: tokens, response tokens among them, the sum of squared lengths, and, where it is
    only read, forward passes of each rank."""

    tokens: float = 0.0
    targets: float = 0.0
    squares: float = 0.0
    forwards: float = 0.0

    @classmethod
    def of(cls, data: EncodedDataset, rows: Rows | slice = slice(None)) -> Amount:
        lengths, targets = data.lengths[rows], data.n_targets[rows]
        return cls(float(lengths.sum()), float(targets.sum()), float((lengths.astype(np.float64) ** 2).sum()))

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Amount:
        return Amount(*(times * one for one in astuple(self)))


@dataclass(frozen=True, slots=True)
class Work:
    """One stage: a model with what it only reads and what it is trained on.

    options        of its training, or of the run where it only reads
    largest        the micro-batch with the most token slots, which needs the most memory; None: nothing is trained
    accumulated    whether its step has others
    micro_batches  of each rank in a step, on average
    passes         through the backbone in a step, on average: one for each segment of a micro-batch
    """

    name: str
    model_path: str
    lora: LoraOptions
    options: TrainingOptions
    read: Amount
    trained: Amount = field(default_factory=Amount)
    steps: int = 0
    largest: Batch | None = None
    accumulated: bool = False
    micro_batches: float = 0.0
    passes: float = 0.0


class Planner:
    """A ReferenceContext that writes down what it is asked for instead of doing it; then what the arms will do."""

    def __init__(self, config: RunConfig, rows: RunRows, machine: Machine) -> None:
        self._config, self._rows, self._machine = config, rows, machine
        self.ids = rows.data.train.ids
        self._work: list[Work] = []

    def plan(self) -> list[Work]:
        """The reference's stage, the target's, the NTP baseline's where there is one, the base model's."""
        config = self._config
        if config.resolved_pairing() and config.splitter.needs_confidence and not config.reference.single_run:
            config.reference.collect(self)
        return [*self._work, *self._arms()]

    def train_and_score(self, **asked: Any) -> TrainingDynamics:
        config, model, checkpoints = self._config, asked["model"] or ReferenceModel(), asked["checkpoints"]
        path, data = self._rows_of(model)
        options = inherit(config.training, asked["training"])
        order = TrainingOrder(len(data), lambda epoch: None, options=options, seed=0)
        steps = [] if checkpoints == "online" else checkpoint_steps(checkpoints, order.total_steps)
        read = self._scored(data) * len(steps)
        if asked.get("response_alone"):  # without its instruction
            share = read.targets / max(read.tokens, 1)
            read += Amount(read.targets, read.targets, read.squares * share**2, read.forwards * share)
        work = Work("reference", path, reference_lora(config.model, model), options, read)
        last = max(steps, default=order.total_steps)  # what would be trained beyond it is not
        self._work.append(self._training(work, data, order, last))
        return self._nothing(max(len(steps), 1))

    def score_models(self, paths: Sequence[str], **asked: Any) -> TrainingDynamics:
        model = ReferenceModel(path=paths[0], template=asked["template"], max_length=asked["max_length"])
        _, data = self._rows_of(model, option="reference")
        read = self._scored(data) * len(paths)
        self._work.append(Work("reference", paths[0], LoraOptions(), self._config.training, read))
        return self._nothing(len(paths))

    def _rows_of(self, model: ReferenceModel, option: str = "reference.model") -> tuple[str, EncodedDataset]:
        path, _, data, notes = rows_of_reference(self._config, self._rows, model, World(), option=option)
        for note in notes:
            print(note, file=sys.stderr)
        return path, data

    def _nothing(self, checkpoints: int) -> TrainingDynamics:
        n = len(self.ids)
        zero = np.zeros((n, checkpoints))
        return TrainingDynamics(self.ids, np.arange(checkpoints), zero, np.ones(n, np.int64), zero.astype(np.int64))

    def _arms(self) -> list[Work]:
        config, data, held_out = self._config, self._rows.data.train, self._rows.data.eval
        options, path, lora = config.training, config.model.path, config.model.lora
        order = TrainingOrder(len(data), self._pairs(), options=options, seed=config.seed)
        untrained = read = self._scored(data, sample_rows(data.ids))
        if held_out is not None:
            once = self._scored(held_out)
            untrained += once
            # One evaluation after the training, the others by callbacks; what those of one's own do is not known.
            chosen = [one.every for one in config.callbacks if isinstance(one, Evaluate)]
            read += once * (1 + sum(len(order.ends) if n is None else order.total_steps // n for n in chosen))
        train = baseline = self._training(Work("train", path, lora, options, read), data, order, order.total_steps)
        if config.objective.needs_batch_nll:  # each batch is read before it is trained on
            train = replace(train, read=read + replace(train.trained, forwards=train.passes * train.steps))
        arms = [train, replace(baseline, name="baseline")] if config.with_baseline else [train]
        return [*arms, Work("base", path, lora.without_adapters(), options, untrained)]

    def _pairs(self) -> Callable[[int], Rows | None]:
        """The pairs of the run where they need no confidence; else some of equal halves."""
        config, data, pairing = self._config, self._rows.data.train, self._config.resolved_pairing()
        if pairing is None:
            return unpaired().pairs_of
        if not config.splitter.needs_confidence:
            scores = self._rows.table()
            split = check_split(config.splitter, config.splitter.split(scores, seed=config.seed), scores)
            return fixed(split, scores, pairing, config.seed).pairs_of

        def of_halves(epoch: int) -> Rows:
            order = generator(config.seed, "estimate", epoch).permutation(len(data))
            return order[: len(data) // 2 * 2].reshape(-1, 2).astype(np.int64)

        return of_halves

    def _scored(self, data: EncodedDataset, rows: Rows | slice = slice(None)) -> Amount:
        """One reading by all ranks together.

        A batch is sorted by length and filled up to `scoring_tokens`: that it may hold a few less is not counted.
        """
        once = Amount.of(data, rows)
        room = scoring_tokens(self._machine.device) * self._machine.count
        return replace(once, forwards=math.ceil(once.tokens / room))

    def _training(self, work: Work, data: EncodedDataset, order: TrainingOrder, steps: int) -> Work:
        """The work with a training that stops after so many steps of the order."""
        if not steps:
            return work
        trained = Amount.of(data) * (steps / math.ceil(len(data) / work.options.global_batch_size))
        work = replace(work, trained=trained, steps=steps)
        return with_batches(work, data, order, self._machine, self._config.model.attention)


def with_batches(
    work: Work, data: EncodedDataset, order: TrainingOrder, machine: Machine, attention: str | None
) -> Work:
    """The work with its micro-batches, of some steps dealt as a run deals them; `attention` as model.attention."""
    options = work.options
    one_row = options.padding_free  # where the model is found to bear it
    if one_row == "auto":
        one_row = options.length_groups is None and is_skipping(attention, machine.device)
    found, counts = [], []
    for step in np.unique(np.linspace(0, order.total_steps - 1, SAMPLED_STEPS).astype(int)).tolist():
        batch, ranks, device = order.batch(step), machine.count, machine.device
        dealt = deal(batch, data.lengths, options, ranks=ranks, device=device, padding_free=one_row)
        counts.append((len(dealt), sum(one.n_segments for one in dealt)))
        for one in dealt:
            for units in one.ranks:
                lengths = [int(data.lengths[slot.row]) for unit in units for slot in unit]
                slots = token_slots(lengths, one.n_segments, padding_free=one_row)
                found.append((slots, len(dealt) > 1, units, min(one.n_segments, len(lengths))))
    _, accumulated, units, n_segments = max(found, key=lambda one: one[:2])
    largest = collate(units, data, n_segments=n_segments, padding_free=one_row)
    micro_batches, passes = np.mean(counts, axis=0).tolist()
    return replace(work, largest=largest, accumulated=accumulated, micro_batches=micro_batches, passes=passes)
