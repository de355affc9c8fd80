"""The command `estimate`: memory and hours of a run on some machine, before anything is started."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sftmix.cli.parsing import OwnOption, configuration
from sftmix.tools.estimate.gpus import GPUS

ABOUT = """Say what `run` with these options will need: memory of each device, hours of each stage and of the whole.
Rows are read and tokenised; of the models only the config is read, so it takes seconds and no GPU.

  sftmix estimate --config recipe:alpaca-llama3.1-8b --gpu H100 --gpus 8
  sftmix estimate --model.path NAME --data.train rows.json --gpu cpu --tflops 0.2

Hours are FLOPs / (peak x MFU), or bytes / bandwidth where the GPUs send each other so much that it takes longer.
--mfu is a guess until a run of yours on such a machine has been measured, and --bandwidth is a data sheet's: what
nccl-tests says of your machine (busbw) is the figure to give."""

_OPTIONS = (
    OwnOption("gpu", str, "H100", "NAME", f"The device: {', '.join(GPUS)} or cpu."),
    OwnOption("gpus", int | None, None, "N", "How many of them; null: as many as a node has, 1 of cpu."),
    OwnOption("gpus_per_node", int, 8, "N", "GPUs of a node, which share the weights under training.parallel hsdp."),
    OwnOption("mfu", float, 0.4, "X", "Share of the peak that real tokens reach, in (0, 1]."),
    OwnOption("tflops", float | None, None, "X", "Peak of one device in TFLOP/s, in place of the known one."),
    OwnOption(
        "bandwidth",
        float | None,
        None,
        "X",
        "GB/s of one GPU in one direction, between nodes if there are several; null: the data sheet's within a node "
        f"({', '.join(f'{name} {link}' for name, (*_, link) in GPUS.items())}), else communication is not counted.",
    ),
    OwnOption("json", bool, False, "", "Print JSON instead of a table."),
)


def main(argv: Sequence[str]) -> None:
    """Parse, estimate, print."""
    config, values = configuration("estimate", ABOUT, argv, _OPTIONS, needs_out=False)
    from sftmix.pipeline.start import check_names_given

    check_names_given(config)
    from sftmix.tools.estimate.run import Machine, estimate

    options = vars(values)
    as_json = options.pop("json")
    needs = estimate(config, Machine(**options))
    print(json.dumps(needs, indent=1) if as_json else described(needs))


PARTS = """\
(process: interpreter, libraries and rows; weights: float32, or 4 bits; optimizer: its state; gradients: float32, of
the micro-batches before; activations: kept for the backward, and layers gathered from other GPUs; working: logits, a
layer's backward or the optimizer's temporaries)"""

REMEDIES = """\
What lowers activations: a smaller --training.micro_batch_size, --training.activation_checkpointing true; the
rest: --training.parallel fsdp on more --gpus, with one micro-batch a step (between several each GPU holds the whole
gradient), --model.lora.r 16, without fsdp also --model.lora.quantize 4bit or --optimizer AdamW8bit."""
HEAD = """\
| stage | model | numbers | trained | steps | training tokens | scored tokens | PFLOP | device hours \
| s to compute a step | s to communicate | GiB each |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def described(estimate: Mapping[str, Any]) -> str:
    """A table of the stages, the parts of their memory, and the whole."""
    machine, stages, hours = estimate["machine"], estimate["stages"], estimate["device_hours"]
    lines = [
        f"{estimate['examples']:,} examples of {estimate['tokens']:,} tokens on {machine['count']} x {machine['name']}",
        HEAD,
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
        lines.append("Hours need the peak of the device in the training's precision: --tflops.")
    else:
        lines.append(f"In all {hours:,.3g} device hours: {hours / machine['count']:,.3g} hours on {machine['count']}.")
    lines.append(f"The whole costs {estimate['times_plain']:.2f} times the FLOPs of the target's training alone.")
    if machine["bandwidth"] is None and machine["count"] > 1:
        lines.append("note: no time is counted for communication: give its --bandwidth in GB/s")
    if large := [name for name, stage in stages.items() if stage["fits"] is False]:
        lines += [f"warning: {', '.join(large)}: more than the {machine['memory'] / 2**30:.3g} GiB of each", REMEDIES]
    return "\n".join(lines)
