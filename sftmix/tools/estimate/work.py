"""The stages of a run, with the rows that each reads and trains on, by the run's own order; nothing is trained."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace

import numpy as np

from sftmix.batches.collate import collate
from sftmix.batches.deal import deal, token_slots
from sftmix.batches.order import TrainingOrder, one_split
from sftmix.common.rng import generator
from sftmix.common.world import World
from sftmix.components.base import Need
from sftmix.components.callbacks import Evaluate
from sftmix.components.contracts import check_split
from sftmix.components.reference import FromCheckpoints
from sftmix.config import RunConfig
from sftmix.data import EncodedDataset
from sftmix.measure.model import sample_rows
from sftmix.model.packing import is_skipping
from sftmix.options import LoraOptions, ReferenceModel, TrainingOptions, inherit, reference_lora
from sftmix.pipeline.reference_rows import rows_of_reference
from sftmix.pipeline.rows import RunRows
from sftmix.tools.estimate.machine import Machine
from sftmix.training.dynamics import checkpoint_steps
from sftmix.training.scoring import scoring_tokens
from sftmix.types import Batch, Rows

SAMPLED_STEPS = 100
"""Steps of a training, evenly spaced, whose batches are dealt."""


@dataclass(frozen=True, slots=True)
class Amount:
    """The amount of data that goes through a model.

    tokens    all tokens
    targets   response tokens among them
    squares   sum of the squared lengths of the examples
    forwards  forward passes of each rank, where nothing is trained
    """

    tokens: float = 0.0
    targets: float = 0.0
    squares: float = 0.0
    forwards: float = 0.0

    @classmethod
    def of(cls, data: EncodedDataset, rows: Rows | slice = slice(None), times: float = 1.0) -> Amount:
        lengths = data.lengths[rows].astype(np.float64)
        sums = lengths.sum(), data.n_targets[rows].sum(), (lengths**2).sum()
        return cls(*(times * float(one) for one in sums))

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Work:
    """One stage: a model, what it scores and what it is trained on.

    options        training options of the stage, or those of the run if nothing is trained
    read           what is scored
    largest        the micro-batch with the most token slots, which needs the most memory; None: nothing is trained
    accumulated    its step has other micro-batches
    micro_batches  micro-batches of each rank in a step, on average
    passes         passes through the backbone in a step, on average: one for each segment of a micro-batch
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
    """The stages of a run; of a reference, what its attributes say of it."""

    def __init__(self, config: RunConfig, rows: RunRows, machine: Machine) -> None:
        self._config, self._rows, self._machine = config, rows, machine

    def plan(self) -> list[Work]:
        """The stages in their order: reference (if the run has one), train, baseline (if it is wanted), base."""
        config, data, held_out = self._config, self._rows.data.train, self._rows.data.eval
        options, path, lora = config.training, config.model.path, config.model.lora
        order = TrainingOrder(len(data), self._pairs(), options=options, seed=config.seed)
        untrained = read = self._scored(data, rows=sample_rows(data.ids))
        if held_out is not None:
            # One evaluation comes after the training. The others are those of Evaluate: what a user's own callback does
            # is not known.
            chosen = [one.every for one in config.callbacks if isinstance(one, Evaluate)]
            evaluations = 1 + sum(len(order.ends) if n is None else order.total_steps // n for n in chosen)
            untrained, read = (read + self._scored(held_out, times=times) for times in (1, evaluations))
        train = baseline = self._trained(Work("train", path, lora, options, read), data, order, order.total_steps)
        if Need.BATCH_NLL in config.objective.needs:  # each batch is read before it is trained on
            train = replace(train, read=read + replace(train.trained, forwards=train.passes * train.steps))
        arms = [train, replace(baseline, name="baseline")] if config.with_baseline else [train]
        return [*self._reference(), *arms, Work("base", path, lora.without_adapters(), options, untrained)]

    def _reference(self) -> list[Work]:
        config, reference = self._config, self._config.reference
        wanted = config.resolved_pairing() and Need.CONFIDENCE in config.splitter.needs
        if not wanted or not {Need.TRAINING, Need.SCORING} & reference.needs:
            return []
        if isinstance(reference, FromCheckpoints):
            first = ReferenceModel(
                path=reference.paths[0], template=reference.template, max_length=reference.max_length
            )
            path, data = self._rows_of(first, option="reference")
            read = self._scored(data, times=len(reference.paths))
            return [Work("reference", path, LoraOptions(), config.training, read)]
        model = reference.model or ReferenceModel()
        path, data = self._rows_of(model)
        options = inherit(config.training, reference.training)
        order = TrainingOrder(len(data), lambda epoch: None, options=options, seed=0)
        checkpoints = getattr(reference, "checkpoints", reference.most_checkpoints(options.epochs) or 1)
        steps = [] if checkpoints == "online" else checkpoint_steps(checkpoints, order.total_steps)
        read = self._scored(data, times=len(steps))
        if getattr(reference, "response_alone", False):  # each response once more, without its instruction
            share = read.targets / max(read.tokens, 1)
            read += Amount(read.targets, read.targets, read.squares * share**2, read.forwards * share)
        work = Work("reference", path, reference_lora(config.model, model), options, read)
        last = max(steps, default=order.total_steps)  # where the training of the reference stops
        return [self._trained(work, data, order, last if Need.TRAINING in reference.needs else 0)]

    def _rows_of(self, model: ReferenceModel, option: str = "reference.model") -> tuple[str, EncodedDataset]:
        path, _, data, notes = rows_of_reference(self._config, self._rows, model, World(), option=option)
        for note in notes:
            print(note, file=sys.stderr)
        return path, data

    def _pairs(self) -> Callable[[int], Rows | None]:
        """The pairs of the run, if they need no confidence; else random pairs, as two equal groups would give."""
        config, data, pairing = self._config, self._rows.data.train, self._config.resolved_pairing()
        if pairing is None:
            return lambda epoch: None
        if Need.CONFIDENCE not in config.splitter.needs:
            scores = self._rows.table()
            split = check_split(config.splitter, config.splitter.split(scores, seed=config.seed), scores)
            return one_split(split, scores, pairing, config.seed).pairs_of
        paired = len(data) // 2 * 2
        return lambda epoch: generator(config.seed, "estimate", epoch).permutation(len(data))[:paired].reshape(-1, 2)

    def _scored(self, data: EncodedDataset, rows: Rows | slice = slice(None), times: int = 1) -> Amount:
        """So many scorings by all ranks together, as if each batch were filled up to `scoring_tokens`."""
        room = scoring_tokens(self._machine.device) * self._machine.count
        forwards = times * math.ceil(int(data.lengths[rows].sum()) / room)
        return replace(Amount.of(data, rows, times), forwards=forwards)

    def _trained(self, work: Work, data: EncodedDataset, order: TrainingOrder, steps: int) -> Work:
        """The work with a training that stops after so many steps of the order; some of them are dealt as in a run."""
        if not steps:
            return work
        options, ranks, device = work.options, self._machine.count, self._machine.device
        one_row = options.padding_free  # auto: unless the model turns out to mix the examples of a row
        if one_row == "auto":
            one_row = options.length_groups is None and is_skipping(self._config.model.attention, device)
        found, counts = [], []
        for step in np.unique(np.linspace(0, order.total_steps - 1, SAMPLED_STEPS).astype(int)).tolist():
            dealt = deal(order.batch(step), data.lengths, options, ranks=ranks, device=device, padding_free=one_row)
            counts.append((len(dealt), sum(one.n_segments for one in dealt)))
            for one in dealt:
                for units in one.ranks:
                    lengths = [int(data.lengths[slot.row]) for unit in units for slot in unit]
                    slots = token_slots(lengths, one.n_segments, padding_free=one_row)
                    found.append((slots, len(dealt) > 1, units, min(one.n_segments, len(lengths))))
        _, accumulated, units, n_segments = max(found, key=lambda one: one[:2])
        micro_batches, passes = np.mean(counts, axis=0).tolist()
        return replace(
            work,
            trained=Amount.of(data, times=steps / math.ceil(len(data) / options.global_batch_size)),
            steps=steps,
            largest=collate(units, data, n_segments=n_segments, padding_free=one_row),
            accumulated=accumulated,
            micro_batches=micro_batches,
            passes=passes,
        )
