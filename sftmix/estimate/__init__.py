"""What a run will need, before anything of it is started: memory per device, hours of each stage and of the whole.

    from sftmix.estimate import estimate, make_machine
    estimate(config, make_machine("H100", 8, mfu=0.4, tflops=None)).hours

The rows are read and tokenised (which the run finds in the cache); of the models only their configs are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sftmix.config import RunConfig
from sftmix.estimate.cost import forward_flops, training_flops
from sftmix.estimate.layout import Layout, check_sharded, make_layout
from sftmix.estimate.machine import GPUS, Machine, make_machine
from sftmix.estimate.memory import Memory, reading_memory, training_memory
from sftmix.estimate.model import FakeModel
from sftmix.estimate.work import PlannedReference, Work, target_work
from sftmix.run_context import RunContext
from sftmix.rundir import RunDirectory
from sftmix.training.distributed import World
from sftmix.training.log import PeakMemory

__all__ = ["GPUS", "Estimate", "Machine", "Memory", "StageEstimate", "estimate", "make_machine"]


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage: what it does, FLOPs of training and of scoring, device-hours (None: peak unknown), memory of one
    device."""

    work: Work
    layout: Layout
    numbers: int
    trained: int
    training_flops: float
    reading_flops: float
    hours: float | None
    memory: Memory

    @property
    def flops(self) -> float:
        return self.training_flops + self.reading_flops


@dataclass(frozen=True, slots=True)
class Estimate:
    """All stages of a run on a machine."""

    machine: Machine
    stages: Sequence[StageEstimate]
    examples: int
    tokens: float

    @property
    def hours(self) -> float | None:
        """Device-hours of the whole."""
        found = [stage.hours for stage in self.stages]
        return None if None in found else sum(hours for hours in found if hours is not None)

    @property
    def times_plain(self) -> float:
        """FLOPs of the whole in those of the target's training alone."""
        (target,) = (stage for stage in self.stages if stage.work.name == "train")
        return sum(stage.flops for stage in self.stages) / target.training_flops


def estimate(config: RunConfig, machine: Machine) -> Estimate:
    """What `run` with this configuration will need. Raises the errors of reading the rows and the configs."""
    config.validate(needs_out=False)
    with tempfile.TemporaryDirectory() as directory, RunDirectory(Path(directory), World()) as place:
        run = RunContext(config, World(), place)
        work = _plan(run, machine)
        process = _resident(machine) if machine.is_cpu else 0.0
        models = list[FakeModel]()
        stages = [_estimated(_model_of(one, config, models), one, config, machine, process) for one in work]
        return Estimate(machine, stages, len(run.data.train), float(run.data.train.lengths.sum()))


def _resident(machine: Machine) -> float:
    """Bytes of this process: the libraries, the rows and tokenizers that a run holds, too, and what the first matrix
    products and the first optimizer step load."""
    layer = torch.nn.Linear(512, 512)
    layer(torch.ones(512, 512)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    return float(PeakMemory(machine.device).bytes())


def _plan(run: RunContext, machine: Machine) -> list[Work]:
    config = run.config
    found: list[Work] = []
    if run.pairing is not None and config.splitter.needs_confidence and not config.reference.single_run:
        context = PlannedReference(run, machine)
        config.reference.collect(context)
        found += context.work
    return found + target_work(run, machine)


def _model_of(work: Work, config: RunConfig, made: list[FakeModel]) -> FakeModel:
    """The stage's model, which stages share: what it has traced takes seconds at 8B."""
    model = FakeModel(work.model_path, config.model.attention, work.lora)
    if model not in made:
        made.append(model)
    return made[made.index(model)]


def _estimated(model: FakeModel, work: Work, config: RunConfig, machine: Machine, process: float) -> StageEstimate:
    layout = make_layout(work.options, machine)
    reading, training = forward_flops(model, work.read), 0.0
    if work.batch is None:
        memory = reading_memory(model, layout, process=process)
    else:
        check_sharded(layout, work.options, work.lora, config.optimizer)
        training = training_flops(model, work.trained, recompute=work.options.activation_checkpointing)
        memory = training_memory(model, work.batch, work.options, config.optimizer, layout, machine, process=process)
    hours = machine.hours(training + reading)
    return StageEstimate(work, layout, model.numbers, model.trained, training, reading, hours, memory)
