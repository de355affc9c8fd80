"""The needs of a run before anything of it is started: memory of each device, hours of each stage and of the whole.

    from sftmix.tools.estimate.run import estimate, make_machine
    estimate(config, machine)["device_hours"]  # `make_machine` makes one of the command line's options

The rows are read and tokenised, and the run will find them in the cache. Of the models only the configs are read.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from sftmix.common.world import World
from sftmix.components.base import Optimizer
from sftmix.config import RunConfig
from sftmix.config.checks import refuse_sharded, validate
from sftmix.pipeline.rows import read_rows, tokenised_rows
from sftmix.tools.estimate import needs
from sftmix.tools.estimate.machine import Layout, Machine, make_machine
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.work import Planner, Work
from sftmix.training.log import PeakMemory

__all__ = ["Machine", "estimate", "make_machine"]


def estimate(config: RunConfig, machine: Machine) -> dict[str, Any]:
    """The needs of `run` with this configuration, as `--json` prints them: bytes, FLOPs, seconds and hours.

    Raises the errors of the options, the rows and the configs of the models.
    """
    validate(config, needs_out=False)
    config, prepared = read_rows(config, World(), progress=True)
    rows = tokenised_rows(config, prepared, World(), progress=True)
    process = _resident() if machine.device.type == "cpu" else 0.0
    models, stages = dict[str, FakeModel](), dict[str, dict[str, Any]]()
    for work in Planner(config, rows, machine).plan():
        key = repr((work.model_path, work.lora))  # stages share a model: at 8B its trace takes seconds
        if key not in models:
            models[key] = FakeModel(work.model_path, config.model.attention, work.lora)
        stages[work.name] = _stage(work, models[key], config.optimizer, machine, process)
    flops = sum(stage["training_flops"] + stage["scoring_flops"] for stage in stages.values())
    return {
        "machine": asdict(machine),
        "examples": len(rows.data.train),
        "tokens": int(rows.data.train.lengths.sum()),
        "stages": stages,
        "device_hours": sum(stage["device_hours"] for stage in stages.values()) if machine.flops else None,
        "times_plain": flops / stages["train"]["training_flops"],  # 1: the target's training alone
    }


def _resident() -> float:
    """Return the bytes of this process, which a run holds, too, after a first matrix product and optimizer step."""
    layer = torch.nn.Linear(512, 512)
    layer(torch.ones(512, 512)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    return float(PeakMemory(torch.device("cpu")).bytes())


def _stage(work: Work, model: FakeModel, optimizer: Optimizer, machine: Machine, process: float) -> dict[str, Any]:
    """FLOPs and hours of all devices together, bytes that each one sends and holds."""
    options, layout = work.options, Layout(work.options, machine)
    if layout.is_sharded and work.largest:
        refuse_sharded(optimizer, work.lora, f"training.parallel {options.parallel} (here {layout.parallel})")
    memory = needs.memory_of(work, model, optimizer, layout, process)
    training = needs.training_flops(model, work.trained, recompute=options.activation_checkpointing)
    scoring = sum(needs.forward_flops(model, work.read))
    weights, gradients, scoring_sent = needs.traffic(work, model, layout)
    steps, sent = max(work.steps, 1), weights + gradients
    computing, communicating = machine.seconds(training / steps, sent)
    hours = machine.hours(training, sent * work.steps) + machine.hours(scoring, scoring_sent)
    return {
        "model": work.model_path,
        "numbers": model.numbers.all,
        "trained": model.numbers.trained,
        "steps": work.steps,
        "training_tokens": round(work.trained.tokens),
        "scored_tokens": round(work.read.tokens),
        "training_flops": training,
        "scoring_flops": scoring,
        "device_hours": hours if machine.flops else None,
        "step": {
            "tokens_per_device": work.trained.tokens / steps / machine.count,
            "micro_batches": work.micro_batches,
            "sent_bytes_per_device": {"weights": weights, "gradients": gradients, "all": sent},
            "computing_seconds": computing,
            "communicating_seconds": communicating,
        },
        "scoring_sent_bytes_per_device": scoring_sent,
        "memory_bytes": memory,
        "fits": None if machine.memory is None else memory["peak"] <= machine.memory,
    }
