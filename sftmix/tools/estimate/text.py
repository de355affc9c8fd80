"""The report of an estimate as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PARTS = """\
  (process: interpreter, libraries and rows; weights: float32, or 4 bits; optimizer: its state; gradients: float32, of
  what is trained; activations: kept for the backward; loss: logits and their gradients; working: layers gathered from
  other GPUs, a layer's backward or the optimizer's temporaries)"""

REMEDIES = """\
  What lowers activations and loss: a smaller --training.micro_batch_size, --training.activation_checkpointing true; the
  rest: --training.parallel fsdp on more --gpus, with one micro-batch a step (between several each GPU holds the whole
  gradient), --model.lora.r 16, without fsdp also --model.lora.quantize 4bit or --optimizer AdamW8bit."""
NUMBERS = {"B": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
MEMORY = {" GiB": 2.0**30, " MiB": 2.0**20}
SENT = {" GB": 1e9, " MB": 1e6}
TIME = {" hours": 3600.0, " minutes": 60.0, " s": 1.0, " ms": 1e-3}


def described(estimate: Mapping[str, Any]) -> str:
    """A table of the stages, the parts of their memory, an optimizer step of each training, and the whole."""
    machine, stages, hours = estimate["machine"], estimate["stages"], estimate["device_hours"]
    count, flops = machine["count"], machine["flops"]
    speed = f", {flops / 1e12:,.3g} TFLOP/s each at MFU {machine['mfu']:g}" if flops else ""
    whole = "Hours need the peak of the device: --tflops."
    if hours is not None:
        whole = f"In all {_in(TIME, hours * 3600)} of device time: {_in(TIME, hours * 3600 / count)} on {count}."
    lines = [
        f"{estimate['examples']:,} examples of {estimate['tokens']:,} tokens on {count} x {machine['name']}{speed}",
        "",
        "| stage | model | trained | steps | training tokens | scored tokens | PFLOP | device time | memory each |",
        f"|{'---|' * 9}",
        *(_row(name, stage) for name, stage in stages.items()),
        "",
        "Memory of each at its peak:",
        *(f"  {name}: {_sum(MEMORY, stage['memory_bytes'])}" for name, stage in stages.items()),
        PARTS,
        "",
        "An optimizer step on each:",
        *(_step(name, stage["step"]) for name, stage in stages.items() if stage["steps"]),
        "",
        whole,
        f"The whole costs {estimate['times_plain']:.2f} times the FLOPs of the target's training alone.",
        *_notes(machine, stages),
    ]
    return "\n".join(lines)


def _row(name: str, stage: Mapping[str, Any]) -> str:
    numbers = [_in(NUMBERS, stage[key]) for key in ("numbers", "trained", "steps", "training_tokens", "scored_tokens")]
    petaflop = (stage["training_flops"] + stage["scoring_flops"]) / 1e15
    time = "?" if stage["device_hours"] is None else _in(TIME, stage["device_hours"] * 3600)
    columns = [name, f"{stage['model']} ({numbers[0]})", *numbers[1:], f"{petaflop:,.3g}", time]
    return f"| {' | '.join(columns)} | {_in(MEMORY, stage['memory_bytes']['peak'])} |"


def _step(name: str, step: Mapping[str, Any]) -> str:
    """Tokens, bytes that are sent, and the time that each takes, where it is known."""
    several = "" if step["micro_batches"] == 1 else "es"
    line = f"  {name}: {step['tokens_per_device']:,.0f} tokens in {step['micro_batches']:,.3g} micro-batch{several}"
    sent = step["sent_bytes_per_device"]
    if sent["all"]:
        line += f", {_in(SENT, sent['all'])} sent and as much received ({_sum(SENT, sent)})"
    for key, what in (("computing_seconds", "computation"), ("communicating_seconds", "communication")):
        if step[key]:
            line += f", {what} {_in(TIME, step[key])}"
    return line


def _notes(machine: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A note if no communication is counted, and a warning for each stage that does not fit."""
    if machine["bandwidth"] is None and machine["count"] > 1:
        where = "" if machine["name"] == "cpu" else " (that of the data sheet holds within a node)"
        yield f"note: no time is counted for communication: give its --bandwidth in GB/s{where}"
    large = {name: stage["memory_bytes"]["peak"] for name, stage in stages.items() if stage["fits"] is False}
    for name, peak in large.items():
        room = _in(MEMORY, machine["memory"])
        yield f"warning: {name} needs {_in(MEMORY, peak)} on each {machine['name']}, which has {room}."
    if large:
        yield REMEDIES


def _sum(units: Mapping[str, float], parts: Mapping[str, float]) -> str:
    """The parts that are not zero; the last one, their sum, is left out."""
    return " + ".join(f"{name} {_in(units, size)}" for name, size in [*parts.items()][:-1] if size)


def _in(units: Mapping[str, float], value: float) -> str:
    """The value in the largest unit that it fills, or in the smallest: three digits, or all of a whole number."""
    unit = next((unit for unit, size in units.items() if value >= size), [*units][-1])
    scaled = value / units[unit]
    return f"{scaled:,.0f}{unit}" if scaled >= 100 else f"{scaled:.3g}{unit}"
