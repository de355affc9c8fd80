"""The command `estimate`: memory and hours of a run on some machine, before anything is started."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sftmix.cli.parsing import OwnOption, configuration
from sftmix.training.gpus import GPUS, MFU

ABOUT = """Say what `run` with these options will need: memory of each device, hours of each stage and of the whole.
Rows are read and tokenised; of the models only the config is read, so it takes seconds and no GPU.

  sftmix estimate --config recipe:alpaca-llama3.1-8b --gpu H100 --gpus 8
  sftmix estimate --model.path NAME --data.train rows.json --tflops 0.2

Hours are FLOPs / (peak x MFU), or bytes / bandwidth where the GPUs send each other so much that it takes longer.
--mfu is a guess until a run of yours on such a machine has been measured, and --bandwidth is a data sheet's: what
nccl-tests says of your machine (busbw) is the figure to give."""

_OPTIONS = (
    OwnOption("gpu", str | None, None, "NAME", f"{', '.join(GPUS)} or cpu; null: this machine."),
    OwnOption("gpus", int | None, None, "N", "How many; null: as many as this machine or a node has, 1 of cpu."),
    OwnOption("gpus_per_node", int, 8, "N", "GPUs of a node, which share the weights under training.parallel hsdp."),
    OwnOption("mfu", float, MFU, "X", "Share of the peak that token slots reach, padding included, in (0, 1]."),
    OwnOption("tflops", float | None, None, "X", "Peak of one device in TFLOP/s, in place of the known one."),
    OwnOption(
        "bandwidth",
        float | None,
        None,
        "X",
        "GB/s of one GPU in one direction, between nodes if there are several; null: the data sheet's within a node, "
        "else communication is not counted.",
    ),
    OwnOption("json", bool, False, "", "Print JSON instead of a table."),
)


def main(argv: Sequence[str]) -> None:
    """Parse, estimate, print."""
    config, values = configuration("estimate", ABOUT, argv, _OPTIONS, needs_out=False)
    from sftmix.tools.runs.start import check_names_given

    check_names_given(config)
    from sftmix.tools.estimate.run import Machine, estimate

    options = vars(values)
    as_json = options.pop("json")
    needs = estimate(config, Machine(**options))
    print(json.dumps(needs, indent=1) if as_json else described(needs))


PARTS = """\
(process: interpreter, libraries and rows; weights: float32, or 4 bits; optimizer: its state; gradients: float32, of
the micro-batches before; activations: kept for the backward; working: head and logits, weights gathered from other
GPUs, a layer's backward or the optimizer's temporaries)"""

REMEDIES = """\
What lowers activations: a smaller --training.micro_batch_size, --training.activation_checkpointing true; the
rest: --training.parallel fsdp on more --gpus, with one micro-batch a step (between several each GPU holds the whole
gradient), --model.lora.r 16, without fsdp also --model.lora.quantize 4bit or --optimizer AdamW8bit."""
HEAD = """\
| stage | model | numbers | trained | steps | training tokens | token slots | scored tokens | PFLOP | time \
| s to compute a step | s to communicate | GiB each |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def described(estimate: Mapping[str, Any]) -> str:
    """A table of the stages, the parts of their memory, and the whole."""
    machine, stages, hours = estimate["machine"], estimate["stages"], estimate["device_hours"]
    lines = [
        f"{estimate['examples']:,} examples of {estimate['tokens']:,} tokens on {machine['count']} x {machine['name']}",
        HEAD,
    ]
    memory = ["", "Memory of each at its peak, GiB:"]
    for name, stage in stages.items():
        step = stage["step"]
        counts = ("numbers", "trained", "steps", "training_tokens", "training_slots", "scored_tokens")
        floats = step["computing_seconds"], step["communicating_seconds"], stage["memory_bytes"]["peak"] / 2**30
        cells = [f"{stage[key]:,}" for key in counts]
        cells.append(f"{(stage['training_flops'] + stage['scoring_flops']) / 1e15:,.3g}")
        cells.append("?" if hours is None else lasting(stage["device_hours"] / machine["count"]))
        cells += ["?" if x is None else f"{x:,.3g}" for x in floats]
        lines.append(f"| {' | '.join([name, stage['model'], *cells])} |")
        parts = [f"{part} {size / 2**30:.3g}" for part, size in stage["memory_bytes"].items() if size]
        memory.append(f"  {name}: {' + '.join(parts[:-1])}")
    lines += [*memory, PARTS, ""]
    if hours is None:
        lines.append("Hours need the peak of the device in the training's precision: --tflops.")
    else:
        each = f"{machine['count']} x {machine['name']}"
        lines.append(f"In all {lasting(hours / machine['count'])} on {each}: {lasting(hours)} of device time.")
    lines.append(f"The whole costs {estimate['times_plain']:.2f} times the FLOPs of the target's training alone.")
    if machine["bandwidth"] is None and machine["count"] > 1:
        lines.append("note: no time is counted for communication: give its --bandwidth in GB/s")
    if large := [name for name, stage in stages.items() if stage["fits"] is False]:
        lines += [f"warning: {', '.join(large)}: more than the {machine['memory'] / 2**30:.3g} GiB of each", REMEDIES]
    return "\n".join(lines)


def lasting(hours: float) -> str:
    """Return a time in its two largest units: 3 days 4 h, 2 h 5 min, 14 min 3 s."""
    seconds, words = round(3600 * hours), list[str]()
    for size, unit in ((86400, " days"), (3600, " h"), (60, " min"), (1, " s")):
        if seconds >= size or words:
            words.append(f"{seconds // size}{unit}")
        seconds %= size
    return " ".join(words[:2]) or "under 1 s"
