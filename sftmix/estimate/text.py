"""An estimate for people, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sftmix.estimate import Estimate, StageEstimate
from sftmix.estimate.machine import GIB


def described(found: Estimate) -> str:
    """A table of the stages, the parts of the memory, and the whole."""
    machine = found.machine
    lines = [
        f"{found.examples:,} examples of {found.tokens:,.0f} tokens on {_machine(found)}",
        "",
        "| stage | model | trained | steps | training tokens | scored tokens | PFLOP | device-hours | memory each |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(found, stage) for stage in found.stages),
        "",
    ]
    for stage in found.stages:
        parts = {name: size for name, size in asdict(stage.memory).items() if size}
        lines.append(f"{stage.work.name}: " + " + ".join(f"{name} {_gib(size)}" for name, size in parts.items()))
    hours = found.hours
    if hours is not None:
        wall = hours / machine.count
        lines += ["", f"In all {hours:,.2f} device-hours, {wall:,.2f} hours on {machine.count}."]
    else:
        lines += ["", "Hours need the peak of the device: --tflops."]
    lines.append(f"The whole costs {found.times_plain:.2f} times the target's training alone.")
    return "\n".join([*lines, *_warnings(found)])


def plain(found: Estimate) -> dict[str, Any]:
    """The same as JSON can hold it; bytes, FLOPs and hours."""
    stages = {
        stage.work.name: {
            "model": stage.work.model_path,
            "numbers": stage.numbers,
            "trained": stage.trained,
            "steps": stage.work.steps,
            "training_tokens": round(stage.work.trained.all),
            "scored_tokens": round(stage.work.read.all),
            "training_flops": stage.training_flops,
            "scoring_flops": stage.reading_flops,
            "device_hours": stage.hours,
            "memory_bytes": {
                **{k: round(v) for k, v in asdict(stage.memory).items()},
                "peak": round(stage.memory.peak),
            },
        }
        for stage in found.stages
    }
    return {
        "machine": asdict(found.machine),
        "examples": found.examples,
        "tokens": round(found.tokens),
        "stages": stages,
        "device_hours": found.hours,
        "times_plain": found.times_plain,
    }


def _machine(found: Estimate) -> str:
    machine = found.machine
    speed = "" if machine.flops is None else f", {machine.flops / 1e12:,.3g} TFLOP/s each at MFU {machine.mfu:g}"
    return f"{machine.count} x {machine.name}{speed}"


def _row(found: Estimate, stage: StageEstimate) -> str:
    work = stage.work
    hours = "?" if stage.hours is None else f"{stage.hours:,.2f}"
    cells = (
        work.name,
        f"{work.model_path} ({_count(stage.numbers)})",
        _count(stage.trained) if work.batch else "no",
        f"{work.steps:,}",
        _count(work.trained.all),
        _count(work.read.all),
        f"{stage.flops / 1e15:,.3g}",
        hours,
        _gib(stage.memory.peak),
    )
    return f"| {' | '.join(cells)} |"


def _warnings(found: Estimate) -> list[str]:
    machine = found.machine
    if machine.memory is None:
        return []
    return [
        f"warning: {stage.work.name} needs {_gib(stage.memory.peak)} on each {machine.name}, which has "
        f"{_gib(machine.memory)}: {_advice(stage)}"
        for stage in found.stages
        if stage.memory.peak > machine.memory
    ]


def _advice(stage: StageEstimate) -> str:
    """What makes a stage need less."""
    work, ways = stage.work, ["more --gpus"]
    if work.batch is None:
        return ways[0]
    held = f"each GPU holds the whole gradient, {_gib(4 * stage.trained)}, between the micro-batches of a step"
    if stage.layout.is_sharded and work.batch.accumulated:
        ways.append(f"one micro-batch a step (a smaller training.global_batch_size), as {held} under FSDP")
    elif stage.layout.is_sharded:
        ways.append(f"a smaller training.micro_batch_size, as long as a step stays one micro-batch (else {held})")
    else:
        ways.append("a smaller training.micro_batch_size")
    return ", ".join([*ways, "training.activation_checkpointing true", "or --model.lora.r 16"])


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.3g}{unit}"
    return f"{number:,.0f}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"
