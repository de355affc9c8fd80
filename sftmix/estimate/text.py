"""An estimate for people, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from sftmix.estimate.machine import GIB, GIGA, Machine
from sftmix.estimate.remedies import whole_gradient
from sftmix.estimate.result import Estimate, StageEstimate

PARTS = {
    "process": "interpreter, libraries and rows",
    "weights": "float32, or 4 bits",
    "optimizer": "its state",
    "gradients": "float32, of what is trained",
    "activations": "kept for the backward",
    "loss": "logits and their gradients",
    "working": "layers gathered from other GPUs, a layer's backward or the optimizer's temporaries",
}
"""What is in each part of the memory."""


def described(found: Estimate) -> str:
    """A table of the stages, the parts of the memory, one step of each training, and the whole."""
    machine = found.machine
    lines = [
        f"{found.examples:,} examples of {found.tokens:,.0f} tokens on {_machine(found)}",
        "",
        "| stage | model | trained | steps | training tokens | scored tokens | PFLOP | device time | memory each |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(found, stage) for stage in found.stages),
        "",
        "Memory of each at its peak:",
        *(_memory(stage) for stage in found.stages),
        _legend(found),
        "",
        "An optimizer step on each:",
        *(_step(machine, stage) for stage in found.stages if stage.work.batches),
        "",
    ]
    hours = found.hours
    if hours is None:
        lines.append("Hours need the peak of the device: --tflops.")
    else:
        each = "" if machine.count == 1 else f": {_time(hours * 3600 / machine.count)} on {machine.count}"
        lines.append(f"In all {_time(hours * 3600)} of device time{each}.")
    lines.append(f"The whole costs {found.times_plain:.2f} times the FLOPs of the target's training alone.")
    return "\n".join([*lines, *_notes(found), *_warnings(found)])


def plain(found: Estimate) -> dict[str, Any]:
    """The same as JSON can hold it; bytes, FLOPs, seconds and hours."""
    return {
        "machine": asdict(found.machine),
        "examples": found.examples,
        "tokens": round(found.tokens),
        "stages": {stage.work.name: _plain(found, stage) for stage in found.stages},
        "device_hours": found.hours,
        "times_plain": found.times_plain,
    }


def _plain(found: Estimate, stage: StageEstimate) -> dict[str, Any]:
    machine, work = found.machine, stage.work
    remedies = found.remedies.get(work.name, ())
    return {
        "model": work.model_path,
        "numbers": stage.numbers,
        "trained": stage.trained,
        "steps": work.steps,
        "training_tokens": round(work.trained.all),
        "scored_tokens": round(work.read.all),
        "training_flops": stage.training_flops,
        "scoring_flops": stage.reading_flops,
        "device_hours": stage.hours(machine),
        "step": {
            "tokens_per_device": _tokens(machine, stage),
            "micro_batches": work.batches.micro_batches if work.batches else 0.0,
            "sent_bytes_per_device": {**asdict(stage.traffic), "all": stage.traffic.all},
            "computing_seconds": machine.computing(stage.step_flops),
            "communicating_seconds": machine.communicating(stage.traffic.all),
        },
        "scoring_sent_bytes_per_device": stage.reading_sent,
        "memory_bytes": {**{k: round(v) for k, v in asdict(stage.memory).items()}, "peak": round(stage.memory.peak)},
        "fits": None if machine.memory is None else stage.memory.peak <= machine.memory,
        "remedies": {one.options: round(one.peak) for one in remedies},
    }


# ----------------------------------------------------------------------------------------------- lines


def _machine(found: Estimate) -> str:
    machine = found.machine
    speed = "" if machine.flops is None else f", {machine.flops / 1e12:,.3g} TFLOP/s each at MFU {machine.mfu:g}"
    return f"{machine.count} x {machine.name}{speed}"


def _row(found: Estimate, stage: StageEstimate) -> str:
    work, hours = stage.work, stage.hours(found.machine)
    cells = (
        work.name,
        f"{work.model_path} ({_count(stage.numbers)})",
        _count(stage.trained) if work.batches else "no",
        f"{work.steps:,}",
        _count(work.trained.all),
        _count(work.read.all),
        f"{stage.flops / 1e15:,.3g}",
        "?" if hours is None else _time(hours * 3600),
        _size(stage.memory.peak),
    )
    return f"| {' | '.join(cells)} |"


def _memory(stage: StageEstimate) -> str:
    parts = {name: size for name, size in asdict(stage.memory).items() if size}
    return f"  {stage.work.name}: " + " + ".join(f"{name} {_size(size)}" for name, size in parts.items())


def _legend(found: Estimate) -> str:
    """What the parts are that are in some stage."""
    there = {name for stage in found.stages for name, size in asdict(stage.memory).items() if size}
    return "  (" + "; ".join(f"{name}: {what}" for name, what in PARTS.items() if name in there) + ")"


def _step(machine: Machine, stage: StageEstimate) -> str:
    """Tokens, what is sent, and how long the two take."""
    traffic, batches = stage.traffic, stage.work.batches
    assert batches is not None
    several = "" if batches.micro_batches == 1 else "es"
    parts = [f"{_tokens(machine, stage):,.0f} tokens in {batches.micro_batches:,.3g} micro-batch{several}"]
    if traffic.all:
        shares = {name: size for name, size in asdict(traffic).items() if size}
        named = " + ".join(f"{name} {_bytes(size)}" for name, size in shares.items())
        parts.append(f"{_bytes(traffic.all)} sent and as much received ({named})")
    computing, communicating = machine.computing(stage.step_flops), machine.communicating(traffic.all)
    if computing is not None:
        parts.append(f"computation {_time(computing)}")
    if machine.bandwidth and communicating:
        parts.append(f"communication {_time(communicating)} at {machine.bandwidth / GIGA:,.3g} GB/s")
    return f"  {stage.work.name}: " + ", ".join(parts)


def _notes(found: Estimate) -> Iterator[str]:
    """What hours leave out, or are decided by."""
    machine = found.machine
    if machine.bandwidth is None and any(stage.traffic.all + stage.reading_sent for stage in found.stages):
        where = "" if machine.is_cpu else " (that of the data sheet holds within a node)"
        yield f"note: no time is counted for communication: give its --bandwidth in GB/s{where}"
    slow = [f"{stage.work.name} ({times:,.3g})" for stage in found.stages if (times := _times(machine, stage)) > 1]
    if slow:
        yield (
            f"note: communication takes longer than computation, so many times, in a step of {', '.join(slow)}: "
            "a larger global batch, fewer and larger micro-batches or fewer GPUs use them better"
        )


def _times(machine: Machine, stage: StageEstimate) -> float:
    """How often the time of its computation a step communicates; 0: unknown."""
    computing, communicating = machine.computing(stage.step_flops), machine.communicating(stage.traffic.all)
    return communicating / computing if computing and communicating else 0.0


def _warnings(found: Estimate) -> Iterator[str]:
    machine = found.machine
    for stage in found.too_large:
        yield (
            f"warning: {stage.work.name} needs {_size(stage.memory.peak)} on each {machine.name}, which has "
            f"{_size(machine.memory or 0)}. {_advice(found, stage)}"
        )
        for one in found.remedies.get(stage.work.name, ()):
            fits = ", which fits" if one.peak <= (machine.memory or 0) else ""
            yield f"  {one.options}: {_size(one.peak)}{fits}"


def _advice(found: Estimate, stage: StageEstimate) -> str:
    """Before the remedies: why it is so much where FSDP shares less than one expects."""
    whole, why = whole_gradient(stage), ""
    if whole:
        why = f"Each GPU holds the whole gradient, {_size(whole)}, between the micro-batches of a step under FSDP. "
    lowers = found.remedies.get(stage.work.name)
    return why + ("Each of these lowers it:" if lowers else "No single option that is known here lowers it.")


def _tokens(machine: Machine, stage: StageEstimate) -> float:
    """Of each device in a step."""
    return stage.work.trained.all / max(stage.work.steps, 1) / machine.count


# ----------------------------------------------------------------------------------------------- units


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.3g}{unit}"
    return f"{number:,.0f}"


def _size(size: float) -> str:
    """Bytes in memory."""
    return f"{size / GIB:,.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"


def _bytes(size: float) -> str:
    """Bytes on the way."""
    return f"{size / GIGA:,.3g} GB" if size >= GIGA / 10 else f"{size / 1e6:,.3g} MB"


def _time(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1e3:,.3g} ms"
    if seconds < 60:
        return f"{seconds:,.3g} s"
    return f"{seconds / 60:,.1f} minutes" if seconds < 3600 else f"{seconds / 3600:,.1f} hours"
