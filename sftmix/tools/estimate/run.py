"""The needs of a run before anything of it is started: memory of each device, hours of each stage and of the whole.

    from sftmix.tools.estimate.run import Machine, estimate
    estimate(config, machine)["device_hours"]  # a Machine has the options of the command line

The rows are read and tokenised, and the run will find them in the cache. Only the configs of the models are read.
Memory is one rank's, by the model that a run checks itself with (`sftmix.training.footprint`).
"""

import math
from typing import Any

from sftmix.config import RunConfig
from sftmix.config.wants import Wants
from sftmix.pipeline.rows import read_rows
from sftmix.ranks.world import World
from sftmix.tools.estimate.model import forward_flops, training_flops
from sftmix.tools.estimate.work import Machine, Work, plan
from sftmix.training.footprint import Parts, StepLayout
from sftmix.training.memory import PeakMemory
from sftmix.training.plan import USABLE, StepPlan, by_cost

__all__ = ["Machine", "estimate"]


def estimate(config: RunConfig, machine: Machine) -> dict[str, Any]:
    """The needs of `run` with this configuration, as `--json` prints them: bytes, FLOPs, seconds and hours.

    Raises the errors of the options, the rows and the configs of the models.
    """
    config, rows = read_rows(config, World())
    works = plan(config, rows, machine)
    # By now it has the libraries of a run. Beside a GPU the process is in the host's memory, which is not counted.
    process = PeakMemory(machine.device).bytes() if machine.name == "cpu" else 0
    stages = {work.name: _stage(work, machine, process) for work in works}
    flops = sum(stage["training_flops"] + stage["scoring_flops"] for stage in stages.values())
    hours = [stage["device_hours"] for stage in stages.values()]
    return {
        "machine": vars(machine),
        "examples": len(rows.data.train),
        "tokens": int(rows.data.train.lengths.sum()),
        "chosen_later": Wants(config).choice,  # by scores, which are not there yet
        "stages": stages,
        "device_hours": None if None in hours else sum(hours),
        "times_plain": flops / stages["train"]["training_flops"],  # 1: the target's training alone
    }


def _stage(work: Work, machine: Machine, process: int) -> dict[str, Any]:
    """FLOPs and hours of all devices together, bytes that each one holds. What they send each other takes no time."""
    model, recompute = work.model, work.options.activation_checkpointing is True
    memory = {"process": process, **parts_of(work)}
    beside = sum(memory.values()) - memory["weights"]
    if machine.name == "cpu":
        # An export is read back beside the trained weights, a model before its weights are there.
        read = process + memory["weights"] * (work.steps > 0) + model.read_bytes // model.shards
        memory["files"] = max(0, read - sum(memory.values()))
    memory["peak"] = sum(memory.values())
    training = training_flops(model, work.computed, recompute=recompute)
    scoring = sum(forward_flops(model, work.read))
    computing = hours = None
    if peak := machine.tflops[model.precision]:
        speed = peak * 1e12 * machine.mfu
        computing = training / max(work.steps, 1) / speed / machine.count  # FLOPs of all devices
        hours = (scoring + training) / speed / 3600
    return {
        "model": model.path,
        "numbers": model.numbers.whole.all,
        "trained": model.numbers.whole.trained * bool(work.steps),
        "steps": work.steps,
        "training_tokens": round(work.trained[0]),
        "training_slots": round(work.computed[0]),
        "scored_tokens": round(work.read[0]),
        "training_flops": training,
        "scoring_flops": scoring,
        "device_hours": hours,
        "step": {
            "micro_batches": work.micro_batches,
            "micro_batch_slots": work.slots,
            "activation_checkpointing": recompute,
            "computing_seconds": computing,
        },
        "memory_bytes": memory,
        "fits": None if machine.memory is None else beside <= USABLE * (machine.memory - memory["weights"]),
        "plans": [_of_plan(plan) for plan in by_cost(work.plans)],
    }


def _of_plan(plan: StepPlan) -> dict[str, Any]:
    """Return the values of a plan, its layout under the names of the training options."""
    free = plan.free if plan.free < math.inf else None  # JSON has no infinity
    return {**plan._asdict(), "free": free, "layout": plan.layout._asdict(), "fits": plan.fits, "words": str(plan)}


def parts_of(work: Work) -> dict[str, int]:
    """Return the bytes of each part on one device, at the peak of a step, or of a scoring without one."""
    model, memory, optimizer = work.model, work.memory, 0.0
    if memory is None:  # FSDP has gathered two layers (the next one comes) and what is outside the layers
        numbers, size = model.numbers, 2 if model.precision == "bf16" else 4
        gathered = 2 * numbers.layers.all / numbers.n_layers + numbers.outside.all
        held = Parts(0.0, 0.0, size * gathered * (model.shards > 1))
    else:
        optimizer = memory.optimizer + memory.teacher
        options = work.options
        recompute, reshard = options.activation_checkpointing is True, options.reshard_after_forward is not False
        layout = StepLayout(work.micro_batches > 1, recompute, reshard, options.reduce_each_micro_batch is True)
        held = memory.peak(work.slots, layout)
    parts = {"weights": model.stored_bytes / model.shards, "optimizer": optimizer, **held._asdict()}
    return {part: round(size) for part, size in parts.items()}
