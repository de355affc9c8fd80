"""The report of an estimate as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = """\
(process: interpreter, libraries and rows; weights: float32, or 4 bits; optimizer: its state; gradients: float32, of
the micro-batches before; activations: kept for the backward, and layers gathered from other GPUs; working: logits, a
layer's backward or the optimizer's temporaries)"""

REMEDIES = """\
What lowers activations: a smaller --training.micro_batch_size, --training.activation_checkpointing true; the
rest: --training.parallel fsdp on more --gpus, with one micro-batch a step (between several each GPU holds the whole
gradient), --model.lora.r 16, without fsdp also --model.lora.quantize 4bit or --optimizer AdamW8bit."""
COLUMNS = (
    *("stage", "model", "numbers", "trained", "steps", "training tokens", "scored tokens", "PFLOP"),
    *("device hours", "s to compute a step", "s to communicate", "GiB each"),
)


def described(estimate: Mapping[str, Any]) -> str:
    """A table of the stages, the parts of their memory, and the whole."""
    machine, stages, hours = estimate["machine"], estimate["stages"], estimate["device_hours"]
    lines = [
        f"{estimate['examples']:,} examples of {estimate['tokens']:,} tokens on {machine['count']} x {machine['name']}",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    memory = ["", "Memory of each at its peak, GiB:"]
    for name, stage in stages.items():
        step, counts = stage["step"], ("numbers", "trained", "steps", "training_tokens", "scored_tokens")
        floats = [(stage["training_flops"] + stage["scoring_flops"]) / 1e15, stage["device_hours"]]
        floats += [step["computing_seconds"], step["communicating_seconds"], stage["memory_bytes"]["peak"] / 2**30]
        cells = [f"{stage[key]:,}" for key in counts] + ["?" if x is None else f"{x:,.3g}" for x in floats]
        lines.append(f"| {' | '.join([name, stage['model'], *cells])} |")
        parts = [f"{part} {size / 2**30:.3g}" for part, size in stage["memory_bytes"].items() if size]
        memory.append(f"  {name}: {' + '.join(parts[:-1])}")
    lines += [*memory, PARTS, ""]
    if hours is None:
        lines.append("Hours need the peak of the device: --tflops.")
    else:
        lines.append(f"In all {hours:,.3g} device hours: {hours / machine['count']:,.3g} hours on {machine['count']}.")
    lines.append(f"The whole costs {estimate['times_plain']:.2f} times the FLOPs of the target's training alone.")
    if machine["bandwidth"] is None and machine["count"] > 1:
        lines.append("note: no time is counted for communication: give its --bandwidth in GB/s")
    if large := [name for name, stage in stages.items() if stage["fits"] is False]:
        lines += [f"warning: {', '.join(large)}: more than the {machine['memory'] / 2**30:.3g} GiB of each", REMEDIES]
    return "\n".join(lines)
