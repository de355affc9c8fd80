"""The needs of a run before anything of it is started: memory of each device, hours of each stage and of the whole.

    from sftmix.tools.estimate.run import estimate, make_machine
    estimate(config, machine)["device_hours"]  # `make_machine` makes one of the command line's options

The rows are read and tokenised, and the run will find them in the cache. Of the models only the configs are read.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sftmix.common.world import World
from sftmix.components.base import Need
from sftmix.components.objectives import NTP
from sftmix.config import RunConfig
from sftmix.config.checks import refuse_sharded
from sftmix.pipeline.rows import read_rows
from sftmix.tools.estimate.memory import memory_of
from sftmix.tools.estimate.model import FakeModel, forward_flops, training_flops
from sftmix.tools.estimate.work import FLOAT, Layout, Machine, Work, layout_of, make_machine, plan
from sftmix.training.log import PeakMemory

__all__ = ["Machine", "estimate", "make_machine"]


def estimate(config: RunConfig, machine: Machine) -> dict[str, Any]:
    """The needs of `run` with this configuration, as `--json` prints them: bytes, FLOPs, seconds and hours.

    Raises the errors of the options, the rows and the configs of the models.
    """
    config, rows = read_rows(config, World(), progress=True)
    process = float(PeakMemory(machine.device).bytes()) if machine.name == "cpu" else 0.0
    stages = {work.name: _stage(work, config, machine, process) for work in plan(config, rows, machine)}
    flops = sum(stage["training_flops"] + stage["scoring_flops"] for stage in stages.values())
    return {
        "machine": asdict(machine),
        "examples": len(rows.data.train),
        "tokens": int(rows.data.train.lengths.sum()),
        "stages": stages,
        "device_hours": sum(stage["device_hours"] for stage in stages.values()) if machine.flops else None,
        "times_plain": flops / stages["train"]["training_flops"],  # 1: the target's training alone
    }


def _stage(work: Work, config: RunConfig, machine: Machine, process: float) -> dict[str, Any]:
    """FLOPs and hours of all devices together, bytes that each one sends and holds.

    Computation and communication overlap: FSDP gathers a layer while the layer before it computes, DDP sends gradients
    during the backward. So the longer one counts; where they do not overlap well, the true time is up to twice as long.
    """
    options, layout = work.options, layout_of(work.options, machine)
    model = FakeModel(work.model_path, config.model.attention, work.lora)
    if layout.shards > 1 and work.largest:
        refuse_sharded(config.optimizer, work.lora, f"training.parallel {options.parallel} (here sharded)")
    trains_it = work.name == "train" and Need.BATCH_NLL not in config.objective.needs
    objective = config.objective if trains_it else NTP()
    memory = {"process": round(process), **memory_of(work, model, objective, config.optimizer, layout, machine)}
    memory["peak"] = sum(memory.values())
    training = training_flops(model, work.trained, recompute=options.activation_checkpointing)
    scoring = sum(forward_flops(model, work.read))
    weights, gradients = traffic(work, model, layout)
    computing = communicating = hours = None
    if machine.bandwidth:
        communicating = (weights + gradients) / machine.bandwidth
    if machine.flops:
        speed = machine.flops * machine.mfu * machine.count
        computing = training / max(work.steps, 1) / speed
        hours = (scoring / speed + work.steps * max(computing, communicating or 0.0)) * machine.count / 3600
    return {
        "model": work.model_path,
        "numbers": model.numbers.all,
        "trained": model.numbers.trained,
        "steps": work.steps,
        "training_tokens": round(work.trained[0]),
        "scored_tokens": round(work.read[0]),
        "training_flops": training,
        "scoring_flops": scoring,
        "device_hours": hours,
        "step": {
            "micro_batches": work.micro_batches,
            "sent_bytes_per_device": {"weights": weights, "gradients": gradients},
            "computing_seconds": computing,
            "communicating_seconds": communicating,
        },
        "memory_bytes": memory,
        "fits": None if machine.memory is None else memory["peak"] <= machine.memory,
    }


def traffic(work: Work, model: FakeModel, layout: Layout) -> tuple[float, float]:
    """Bytes of weights and of gradients that each device sends, and receives, in one optimizer step.

    Ranks form a ring: each passes on (n - 1) / n of a tensor that is gathered or reduced, twice that of an average.
    Each pass through the backbone gathers the decoder layers, and again for the backward; the rest is gathered once per
    micro-batch. The last micro-batch of a step reduces gradients to shards, which copies of the weights then average
    (hsdp; under ddp each rank has a copy). If it has several passes, FSDP sends those of layers that earlier ones left
    with its first pass, and its own with the last.
    """
    copies, ring = layout.copies, (layout.shards - 1) / layout.shards
    weights = 2 * model.layers.all * work.passes + model.outside.all * work.micro_batches
    twice = layout.shards > 1 and work.passes > work.micro_batches > 1
    gradients = model.outside.trained + model.layers.trained * (2 if twice else 1)
    return layout.size * ring * weights, FLOAT * (ring + 2 * (copies - 1) / copies / layout.shards) * gradients
