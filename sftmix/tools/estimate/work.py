"""The devices of a run, and its stages with the rows that each reads and trains on, by the run's own order."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from sftmix.batches.collate import token_slots
from sftmix.batches.deal import deal
from sftmix.batches.order import TrainingOrder, Unit
from sftmix.components.base import Objective
from sftmix.components.callbacks import Evaluate
from sftmix.components.component import Need
from sftmix.components.objectives import NTP
from sftmix.components.reference import FromCheckpoints
from sftmix.config import RunConfig
from sftmix.config.checks import refuse_sharded
from sftmix.config.wants import Wants
from sftmix.data import EncodedDataset
from sftmix.measure.model import sample_rows
from sftmix.options.model import LoraOptions
from sftmix.options.reference import ReferenceModel, inherit, reference_lora
from sftmix.options.training import TrainingOptions
from sftmix.pipeline.rows import RunRows, rows_of_reference
from sftmix.ranks.rng import generator
from sftmix.ranks.world import World, accelerator
from sftmix.tools.estimate.model import MEASURE, FakeModel
from sftmix.training.dynamics import checkpoint_steps
from sftmix.training.footprint import Footprint, Workload
from sftmix.training.gpus import GPUS, Gpu, gpu_named
from sftmix.training.memory import free_memory
from sftmix.training.parallel import shards_of
from sftmix.training.plan import StepPlan, by_cost, imitated, parallels_of, shares_rows, step_plans
from sftmix.types import Float64, Int64, Rows
from sftmix.words.errors import ConfigError

NODE = 8
"""GPUs of a node, which share the weights under training.parallel hsdp if training.shard_group_size is null."""


class Machine:
    """`count` devices of one kind, as the options of the command line describe them.

    tflops  peak of one device by precision, TFLOP/s: the table has none for fp32, a given one counts for both; None:
            unknown, and so are the hours
    memory  bytes of one device; None: unknown
    mfu     share of the peak that the FLOPs of all token slots reach
    """

    def __init__(self, gpu: str | None, gpus: int | None, *, mfu: float, tflops: float | None) -> None:
        """Raise ConfigError if one of the options is not allowed.

        gpu     a name of the table, or cpu; None: the GPUs of this machine, or its CPU
        gpus    None: as many as a node has (of this machine: as it has), or one CPU
        tflops  peak of one device, TFLOP/s; None: the table's
        """
        name, own, free = _here() if gpu is None else (gpu, 1 if gpu == "cpu" else NODE, None)
        peak, gigabytes = GPUS[name][:2] if name in GPUS else (None, None)
        if peak is None and gpu not in (None, "cpu"):
            raise ConfigError(f"gpu is {gpu!r}; there are {', '.join(GPUS)} and cpu (--tflops gives another peak)")
        self.name, self.count, self.mfu = name, own if gpus is None else gpus, mfu
        for option, value in {"gpus": self.count, "mfu": mfu, "tflops": tflops}.items():
            if value is not None and not 0 < value <= (1 if option == "mfu" else math.inf):
                raise ConfigError(f"{option} is {value}; allowed: above 0, and mfu at most 1")
        self.tflops = {"bf16": tflops or peak, "fp32": tflops}
        self.memory = free or (1e9 * gigabytes if gigabytes else None)  # as makers count: 80 GB are 74.5 GiB

    def figures(self, precision: str) -> Gpu | None:
        """Return the figures by which plans of a step are compared; None if they are not known."""
        peak, known = self.tflops[precision], GPUS.get(self.name)
        return known._replace(tflops=peak) if known and peak else None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.name == "cpu" else "cuda")

    @property
    def world(self) -> World:
        """One of its ranks; the others are not there."""
        return World(size=self.count, device=self.device, local_size=min(self.count, NODE))


def _here() -> tuple[str, int, float | None]:
    """Return the kind of this machine's devices, by its name in the table if there is one, their number, free bytes."""
    device = accelerator()
    name, number = "cpu", 1
    if device.type != "cpu":
        own = torch.get_device_module(device).get_device_name(device)
        name, number = gpu_named(own) or own, torch.accelerator.device_count()
    free = free_memory(device)
    return name, number, free if free < math.inf else None


SAMPLED_STEPS = 100
"""Steps of a training, evenly spaced, whose batches are dealt; and one with the longest row, which none of them may
have, and which decides the memory."""


def amount_of(data: EncodedDataset, rows: Rows | slice = slice(None)) -> Float64:
    """f64[3]: all tokens, response tokens among them, and the sum of the squared lengths."""
    return _amount(data.lengths[rows], data.n_targets[rows])


def _amount(lengths: Int64, targets: Int64) -> Float64:
    return np.array([lengths.sum(), targets.sum(), (lengths**2).sum()], float)


class Work(NamedTuple):
    """One stage: a model, what it scores and what it is trained on.

    options        training options of the stage, or the run's if nothing is trained
    read, trained  amounts of data that are scored, and trained on
    computed       of the latter with padding, and what ranks wait for the slowest one
    memory         what a step takes; None: nothing is trained
    plans          of a step, as `training.plan.step_plans` gives them
    slots          token slots of the largest micro-batch, which needs the most memory
    micro_batches  micro-batches of each rank in a step, on average
    """

    name: str
    model: FakeModel
    options: TrainingOptions
    read: Float64
    trained: Float64 = np.zeros(3)
    computed: Float64 = np.zeros(3)
    steps: int = 0
    memory: Footprint | None = None
    plans: Sequence[StepPlan] = ()
    slots: int = 0
    micro_batches: float = 0.0


def _evaluations(config: RunConfig, order: TrainingOrder) -> int:
    """Return how often the held-out rows are scored: by each Evaluate, and once after the training."""
    evaluations = 1
    for one in config.callbacks:
        if isinstance(one, Evaluate):
            # every=null: at the end of each epoch.
            evaluations += order.total_steps // one.every if one.every else len(order.ends)
    return evaluations


def _reference(config: RunConfig, rows: RunRows, machine: Machine) -> Work:
    """Return the work of a reference that trains or scores."""
    reference = config.reference
    # FromCheckpoints has a template and a length of its own, TrainedReference in its model.
    model = reference.model or ReferenceModel()
    if isinstance(reference, FromCheckpoints):
        model = replace(reference.rows, path=reference.paths[0])
    _, own = rows_of_reference(config, rows, model, World())
    training = inherit(config.training, reference.training)
    order = TrainingOrder(len(own), options=training, seed=0)
    # 5, [0.5, 1], or "online", for which the training's own losses are taken and nothing is scored.
    checkpoints = getattr(reference, "checkpoints", reference.most_checkpoints(training.epochs) or 1)
    steps = [] if checkpoints == "online" else checkpoint_steps(checkpoints, order.total_steps)
    trains = Need.TRAINING in reference.needs
    times = len(steps) if trains else reference.most_checkpoints(None) or 1  # FromCheckpoints: its number of models
    fake = _fake(
        model.path or config.model.path, config, reference_lora(config.model, model), training, machine, trains=trains
    )
    scored = amount_of(own)
    if reference.response_alone:  # responses once more, each behind the first token of its row
        scored += _amount(own.n_targets + 1, own.n_targets)
    work = Work("reference", fake, training, times * scored)
    last = max(steps, default=order.total_steps)  # where the training of the reference stops
    return _trained(work, config, NTP(), own, order, machine, last) if last and trains else work


def plan(config: RunConfig, rows: RunRows, machine: Machine) -> list[Work]:
    """The stages in their order: reference (if the run has one), train, baseline (if it is wanted), base.

    Evaluations are Evaluate's, and one after the training: what a user's own callback does is not known. Pairs
    are random ones of all rows. Only the attributes of the reference count; none of its code is run.
    """
    data = rows.data.train
    held_out = rows.data.eval
    options = config.training
    path = config.model.path
    lora = config.model.lora
    n = len(data)
    wants = Wants(config)
    stages = []
    # FromFile needs neither: it reads what another run has scored.
    if wants.dynamics and {Need.TRAINING, Need.SCORING} & config.reference.needs:
        stages.append(_reference(config, rows, machine))

    def pairs(epoch: int) -> Rows | None:
        shuffled = generator(config.seed, "estimate", epoch).permutation(n)
        return shuffled[: n // 2 * 2].reshape(-1, 2) if wants.pairs else None

    order = TrainingOrder(n, pairs, options=options, seed=config.seed)
    # Each model reads a sample of the training rows and the held-out ones; evaluations while it is trained are added.
    base = read = amount_of(data, sample_rows(data.ids))
    if held_out is not None:
        base = base + amount_of(held_out)  # both are one array until here
        read = read + _evaluations(config, order) * amount_of(held_out)
    arms: dict[str, Objective] = {"train": config.objective, **({"baseline": NTP()} if config.with_baseline else {})}
    for name, objective in arms.items():
        work = Work(name, _fake(path, config, lora, options, machine, trains=True), options, read)
        work = _trained(work, config, objective, data, order, machine, order.total_steps)
        before = work.trained * len({Need.BATCH_NLL, Need.TEACHER} & objective.needs)  # each reads every batch once
        stages.append(work._replace(read=read + before, computed=objective.passes * work.computed))
    untrained = _fake(path, config, lora.without_adapters(), options, machine, trains=False)
    return [*stages, Work("base", untrained, options, base)]


def _fake(
    path: str, config: RunConfig, lora: LoraOptions, options: TrainingOptions, machine: Machine, *, trains: bool
) -> FakeModel:
    precision = options.precision
    if precision == "auto":
        precision = "fp32" if machine.name == "cpu" else "bf16"
    shards = shards_of(options, machine.world)
    return FakeModel(path, config.model.attention, lora, precision=precision, shards=shards, trains=trains)


def _planned(
    work: Work, config: RunConfig, objective: Objective, data: EncodedDataset, order: TrainingOrder, machine: Machine
) -> tuple[Work, bool]:
    """Return the work with the plans of a step, what is auto as the best of them has it, and whether rows are shared.

    The steps are followed on fake tensors; ConfigError if they cannot be.
    """
    model, options, world = work.model, work.options, machine.world
    if model.shards > 1:
        refuse_sharded(config.optimizer, model.lora, f"training.parallel {options.parallel} (here sharded)")
    options = replace(options, micro_batch_tokens=options.limits(machine.device.type)[1])
    given = Workload(model.model, data, order, objective, config.optimizer, options, model.precision, world)
    objective.begin(data)
    even = world.size % world.local_size == 0
    try:
        memories = imitated(model.model, given, parallels_of(options, world, by_node=even))
    except RuntimeError as error:
        raise ConfigError(
            f"model.path: estimate cannot follow {model.path}, whose computation may depend on values: {error}. "
            f"{MEASURE}"
        ) from error
    one_row = shares_rows(options, config.model.attention, machine.device)
    padded = not one_row and len({*data.lengths.tolist()}) > 1
    free = {
        name: (machine.memory or math.inf) - model.stored_bytes / one.shards - one.teacher
        for name, one in memories.items()
    }
    found = step_plans(memories, given, free, padded=padded, gpu=machine.figures(model.precision))
    best = by_cost(found)[0]
    model.shards = memories[best.parallel].shards
    return work._replace(options=best.decided(options), memory=memories[best.parallel], plans=found), one_row


def _trained(
    work: Work,
    config: RunConfig,
    objective: Objective,
    data: EncodedDataset,
    order: TrainingOrder,
    machine: Machine,
    steps: int,
) -> Work:
    """The work with a training that stops after so many steps of the order; some of them are dealt as in a run."""
    work, one_row = _planned(work, config, objective, data, order, machine)
    options = work.options

    def lengths_of(units: Sequence[Unit]) -> Int64:
        return data.lengths[[slot.row for unit in units for slot in unit]]

    sampled = {*np.linspace(0, order.total_steps - 1, SAMPLED_STEPS).astype(int).tolist()}  # all, if there are no more
    sampled.add(max(range(order.total_steps), key=lambda step: lengths_of(order.batch(step)).max()))
    dealing: dict[str, Any] = {"ranks": machine.count, "device": machine.device, "padding_free": one_row}
    slots, real = [], 0  # slots of the rank that has most in each micro-step: the others wait for it
    for step in sorted(sampled):
        units = order.batch(step)
        real += int(lengths_of(units).sum())
        for one in deal(units, data.lengths, options, **dealing):  # micro-steps, each with the units of every rank
            lengths = [lengths_of(units_of_rank).tolist() for units_of_rank in one.ranks]
            slots.append(max(token_slots(each, one.n_segments, padding_free=one_row) for each in lengths))
    trained = steps / math.ceil(len(data) / options.global_batch_size) * amount_of(data)  # steps of an epoch
    spent = machine.count * sum(slots) / real  # 1: no padding, and no rank waits
    return work._replace(
        trained=trained,
        computed=trained * np.array([spent, 1, spent]),  # the head has response tokens alone, without padding
        steps=steps,
        slots=max(slots),
        micro_batches=len(slots) / len(sampled),
    )
