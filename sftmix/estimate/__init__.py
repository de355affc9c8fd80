"""What a run will need, before anything of it is started: memory per device, hours of each stage and of the whole.

    from sftmix.estimate import estimate, make_machine
    estimate(config, make_machine("H100", 8, mfu=0.4, tflops=None)).hours

The rows are read and tokenised (which the run finds in the cache); of the models only their configs are.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import torch

from sftmix.common.gpus import GPUS
from sftmix.common.world import World
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.config.text import resolve_text
from sftmix.estimate.cost import forward_flops, training_flops
from sftmix.estimate.layout import check_sharded, make_layout
from sftmix.estimate.machine import Machine, make_machine
from sftmix.estimate.memory import Memory, reading_memory, training_memory
from sftmix.estimate.model import FakeModel
from sftmix.estimate.remedies import remedies
from sftmix.estimate.result import Estimate, Remedy, StageEstimate
from sftmix.estimate.traffic import Traffic, reading_traffic, step_traffic
from sftmix.estimate.work import PlannedReference, PlannedRun, Work, target_work
from sftmix.pipeline.rows import read_rows, tokenised_rows
from sftmix.training.log import PeakMemory

__all__ = ["GPUS", "Estimate", "Machine", "Memory", "Remedy", "StageEstimate", "Traffic", "estimate", "make_machine"]


def estimate(config: RunConfig, machine: Machine) -> Estimate:
    """What `run` with this configuration will need. Raises the errors of reading the rows and the configs."""
    validate(config, needs_out=False)
    config, prepared = read_rows(config, World(), progress=True)
    rows = tokenised_rows(config, prepared, World(), progress=True)
    models, process = list[FakeModel](), _resident(machine) if machine.is_cpu else 0.0
    found = _estimate(PlannedRun(config, rows), machine, models, process)

    def again(config: RunConfig, machine: Machine) -> Estimate:
        changed = PlannedRun(resolve_text(config, prepared), rows)
        with contextlib.redirect_stderr(io.StringIO()):  # it has been said
            return _estimate(changed, machine, models, process)

    return replace(found, remedies=remedies(found, config, again))


def _estimate(run: PlannedRun, machine: Machine, models: list[FakeModel], process: float) -> Estimate:
    """models: those traced so far, which are added to; process: bytes."""
    stages = [
        _estimated(_model_of(one, run.config, models), one, run.config, machine, process) for one in _plan(run, machine)
    ]
    return Estimate(machine, stages, len(run.data.train), float(run.data.train.lengths.sum()))


def _resident(machine: Machine) -> float:
    """Bytes of this process: the libraries, the rows and tokenizers that a run holds, too, and what the first matrix
    products and the first optimizer step load."""
    layer = torch.nn.Linear(512, 512)
    layer(torch.ones(512, 512)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    return float(PeakMemory(machine.device).bytes())


def _plan(run: PlannedRun, machine: Machine) -> list[Work]:
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
    training, traffic = 0.0, Traffic(0.0, 0.0)
    if work.batches is None:
        memory = reading_memory(model, layout, process=process)
    else:
        check_sharded(layout, work.options, work.lora, config.optimizer)
        training = training_flops(model, work.trained, recompute=work.options.activation_checkpointing)
        traffic = step_traffic(model, work.batches, layout, machine.count)
        batch, optimizer = work.batches.largest, config.optimizer
        memory = training_memory(model, batch, work.options, optimizer, layout, machine, process=process)
    return StageEstimate(
        work=work,
        layout=layout,
        numbers=model.numbers,
        trained=model.trained,
        training_flops=training,
        reading_flops=forward_flops(model, work.read),
        traffic=traffic,
        reading_sent=reading_traffic(model, work.read.forwards, layout),
        memory=memory,
    )
