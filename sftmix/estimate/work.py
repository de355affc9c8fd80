"""What a configuration will do, found by letting its reference and its order say it: nothing is trained or scored."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import numpy as np

from sftmix.batches.order import TrainingOrder
from sftmix.batches.pairs import fixed, unpaired
from sftmix.common.rng import generator
from sftmix.common.world import World
from sftmix.components.base import Callback, PairSampler, check_split
from sftmix.components.callbacks import Evaluate
from sftmix.config import RunConfig
from sftmix.data import EncodedDataset, LoadedData
from sftmix.estimate.batches import StepBatches, step_batches
from sftmix.estimate.machine import Machine
from sftmix.measure.model import sample_rows
from sftmix.options import LoraOptions, ReferenceModel, ReferenceTraining, TrainingOptions, reference_lora
from sftmix.pipeline.reference import inherit, rows_of_reference
from sftmix.pipeline.rows import RunRows
from sftmix.training.dynamics import checkpoint_steps
from sftmix.training.scoring import scoring_tokens
from sftmix.types import Rows, TrainingDynamics


@dataclass(frozen=True, slots=True)
class Tokens:
    """How much goes through a model: tokens, response tokens among them, and the sum of squared lengths.

    forwards  of each rank, where the tokens are only read
    """

    all: float
    targets: float
    squares: float
    forwards: float = 0.0

    @classmethod
    def of(cls, data: EncodedDataset, rows: Rows | None = None, times: float = 1.0) -> Tokens:
        """Of a data set or some of its rows, `times` over."""
        lengths, targets = data.lengths, data.n_targets
        if rows is not None:
            lengths, targets = lengths[rows], targets[rows]
        squares = (lengths.astype(np.float64) ** 2).sum()
        return cls(times * float(lengths.sum()), times * float(targets.sum()), times * float(squares))

    def __add__(self, other: Tokens) -> Tokens:
        mine, theirs = (astuple(one) for one in (self, other))
        return Tokens(*(a + b for a, b in zip(mine, theirs, strict=True)))


def scored(data: EncodedDataset, machine: Machine, rows: Rows | None = None, times: float = 1.0) -> Tokens:
    """Of a data set or some of its rows that all ranks score together, `times` over.

    A batch is sorted by length and filled up to `scoring_tokens`: that it may hold a few less is not counted.
    """
    once = Tokens.of(data, rows)
    forwards = math.ceil(once.all / (scoring_tokens(machine.device) * machine.count))
    return replace(Tokens.of(data, rows, times), forwards=times * forwards)


NOTHING = Tokens(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Work:
    """One stage: a model with the tokens it is trained on and those it only reads.

    options  those of its training, or of the run where it only reads
    batches  of a step; None where nothing is trained
    """

    name: str
    model_path: str
    lora: LoraOptions
    trained: Tokens
    read: Tokens
    steps: int
    options: TrainingOptions
    batches: StepBatches | None


@dataclass(frozen=True)
class PlannedRun:
    """A run that is not started: its configuration, and its rows."""

    config: RunConfig
    rows: RunRows

    @property
    def data(self) -> LoadedData:
        return self.rows.data

    @property
    def pairing(self) -> PairSampler | None:
        return self.config.resolved_pairing()


class PlannedReference:
    """A ReferenceContext that writes down what it is asked for instead of doing it."""

    def __init__(self, run: PlannedRun, machine: Machine) -> None:
        self._run, self._machine = run, machine
        self.ids = run.data.train.ids
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
        path, data = self._rows_of(model)
        options = inherit(config.training, training)
        order = TrainingOrder(len(data), lambda epoch: None, options=options, seed=0)
        steps = [] if checkpoints == "online" else checkpoint_steps(checkpoints, order.total_steps)
        read = scored(data, self._machine, times=len(steps))
        if response_alone:  # without its instruction
            share = read.targets / max(read.all, 1)
            read += Tokens(read.targets, read.targets, read.squares * share**2, read.forwards * share)
        stage = ("reference", path, reference_lora(config.model, model))
        last = max(steps, default=order.total_steps)  # what would be trained beyond it is not
        self.work.append(training_work(stage, data, order, options, self._run, self._machine, read, steps=last))
        return self._nothing(max(len(steps), 1))

    def score_models(self, paths: Sequence[str], **options: Any) -> TrainingDynamics:
        model = ReferenceModel(path=paths[0], template=options["template"], max_length=options["max_length"])
        _, data = self._rows_of(model, option="reference")
        passes = scored(data, self._machine, times=len(paths))
        training = self._run.config.training
        self.work.append(Work("reference", paths[0], LoraOptions(), NOTHING, passes, 0, training, None))
        return self._nothing(len(paths))

    def _rows_of(self, model: ReferenceModel, option: str = "reference.model") -> tuple[str, EncodedDataset]:
        path, _, data, notes = rows_of_reference(self._run.config, self._run.rows, model, World(), option=option)
        for line in notes:
            print(f"reference ({path}): {line}", file=sys.stderr)
        return path, data

    def _nothing(self, checkpoints: int) -> TrainingDynamics:
        n = len(self.ids)
        zero = np.zeros((n, checkpoints))
        return TrainingDynamics(self.ids, np.arange(checkpoints), zero, np.ones(n, np.int64), zero.astype(np.int64))


def target_work(run: PlannedRun, machine: Machine) -> list[Work]:
    """The target's stage, the NTP baseline's where there is one, and that of the base model, which is only read."""
    config, data = run.config, run.data.train
    order = TrainingOrder(len(data), _pairs(run), options=config.training, seed=config.seed)
    untrained = read = scored(data, machine, sample_rows(data.ids))
    if run.data.eval is not None:
        untrained += scored(run.data.eval, machine)
        read += scored(run.data.eval, machine, times=1 + _evaluations(config.callbacks, order))
    stage = ("train", config.model.path, config.model.lora)
    baseline = training_work(stage, data, order, config.training, run, machine, read)
    train = baseline
    if config.objective.needs_batch_nll and baseline.batches is not None:  # each batch is read before it is trained on
        forwards = baseline.batches.passes * baseline.steps
        train = replace(baseline, read=baseline.read + replace(baseline.trained, forwards=forwards))
    arms = [train, replace(baseline, name="baseline")] if config.with_baseline else [train]
    lora = config.model.lora.without_adapters()
    return [*arms, Work("base", config.model.path, lora, NOTHING, untrained, 0, config.training, None)]


def _pairs(run: PlannedRun) -> Callable[[int], Rows | None]:
    """Those of the run where they need no confidence; else some of equal halves."""
    config, data = run.config, run.data.train
    rows, pairing = len(data), run.pairing
    if pairing is None:
        return unpaired().pairs_of
    if not config.splitter.needs_confidence:
        scores = run.rows.table()
        split = check_split(config.splitter.split(scores, seed=config.seed), scores)
        return fixed(split, scores, pairing, config.seed).pairs_of

    def of_halves(epoch: int) -> Rows:
        order = generator(config.seed, "estimate", epoch).permutation(rows)
        return order[: rows // 2 * 2].reshape(-1, 2).astype(np.int64)

    return of_halves


def _evaluations(callbacks: Sequence[Callback], order: TrainingOrder) -> int:
    """Held-out evaluations in the course of a training; beside them is one after it.

    What callbacks of one's own do is not known.
    """
    chosen = [one.every for one in callbacks if isinstance(one, Evaluate)]
    return sum(len(order.ends) if every is None else order.total_steps // every for every in chosen)


def training_work(
    stage: tuple[str, str, LoraOptions],
    data: EncodedDataset,
    order: TrainingOrder,
    options: TrainingOptions,
    run: PlannedRun,
    machine: Machine,
    read: Tokens,
    *,
    steps: int | None = None,
) -> Work:
    """The Work of one training stage.

    stage  name, model path and adapters
    steps  after so many of the order's it stops; None: after all
    """
    steps = order.total_steps if steps is None else steps
    trained = Tokens.of(data, times=steps / math.ceil(len(data) / options.global_batch_size))
    batches = step_batches(data, order, options, machine, run.config.model.attention) if steps else None
    return Work(*stage, trained, read, steps, options, batches)
