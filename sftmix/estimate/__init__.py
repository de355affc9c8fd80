"""What a run will need, before anything of it is started: memory per device, hours of each stage and of the whole.

    from sftmix.estimate import estimate, make_machine
    estimate(config, make_machine("H100", 8, mfu=0.4, tflops=None))["device_hours"]

The rows are read and tokenised (which the run finds in the cache); of the models only the configs are read.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from sftmix.common.errors import ConfigError
from sftmix.common.gpus import GPUS
from sftmix.common.world import World
from sftmix.components.base import Optimizer
from sftmix.config import RunConfig
from sftmix.config.checks import quantized_shards, sharded_optimizer, validate
from sftmix.estimate import needs
from sftmix.estimate.machine import Machine, make_layout, make_machine
from sftmix.estimate.model import FakeModel
from sftmix.estimate.work import Planner, Work
from sftmix.pipeline.rows import read_rows, tokenised_rows
from sftmix.training.log import PeakMemory

__all__ = ["GPUS", "Machine", "estimate", "make_machine"]


def estimate(config: RunConfig, machine: Machine) -> dict[str, Any]:
    """What `run` with this configuration will need, as `--json` prints it: bytes, FLOPs, seconds and hours.

    Raises the errors of reading the rows and the configs.
    """
    validate(config, needs_out=False)
    config, prepared = read_rows(config, World(), progress=True)
    rows = tokenised_rows(config, prepared, World(), progress=True)
    process, models, stages = _resident(machine) if machine.is_cpu else 0.0, dict[str, FakeModel](), {}
    for work in Planner(config, rows, machine).plan():
        key = repr((work.model_path, work.lora))  # stages share models: what one has traced takes seconds at 8B
        if key not in models:
            models[key] = FakeModel(work.model_path, config.model.attention, work.lora)
        stages[work.name] = _stage(work, models[key], config.optimizer, machine, process)
    hours = sum(stage["device_hours"] or 0.0 for stage in stages.values())
    flops = sum(stage["training_flops"] + stage["scoring_flops"] for stage in stages.values())
    return {
        "machine": asdict(machine),
        "examples": len(rows.data.train),
        "tokens": int(rows.data.train.lengths.sum()),
        "stages": stages,
        "device_hours": hours if machine.flops else None,
        "times_plain": flops / stages["train"]["training_flops"],  # in those of the target's training alone
    }


def _resident(machine: Machine) -> float:
    """Bytes of this process: the libraries, the rows and tokenizers that a run holds, too, and what the first matrix
    products and the first optimizer step load."""
    layer = torch.nn.Linear(512, 512)
    layer(torch.ones(512, 512)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    return float(PeakMemory(machine.device).bytes())


def _stage(work: Work, model: FakeModel, optimizer: Optimizer, machine: Machine, process: float) -> dict[str, Any]:
    """FLOPs and hours on all devices, bytes sent by each and held by each."""
    options, layout = work.options, make_layout(work.options, machine)
    if layout.is_sharded and work.largest:
        named = f"training.parallel {options.parallel} (here {layout.parallel})"
        if not optimizer.shards:
            raise ConfigError(sharded_optimizer(optimizer, named))
        if work.lora.quantize:
            raise ConfigError(quantized_shards(work.lora, named))
    memory = needs.memory_of(work, model, optimizer, layout, machine, process)
    training = needs.training_flops(model, work.trained, recompute=options.activation_checkpointing)
    weights, gradients = needs.step_traffic(work, model, layout, machine.count) if work.largest else (0.0, 0.0)
    steps, sent, scoring = max(work.steps, 1), weights + gradients, needs.forward_flops(model, work.read)
    scoring_sent = needs.reading_traffic(model, work.read.forwards, layout)
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
            "computing_seconds": machine.computing(training / steps),
            "communicating_seconds": machine.communicating(sent),
        },
        "scoring_sent_bytes_per_device": scoring_sent,
        "memory_bytes": memory,
        "fits": None if machine.memory is None else memory["peak"] <= machine.memory,
    }
