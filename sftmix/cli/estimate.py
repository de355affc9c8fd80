"""`estimate`: a run's configuration and a machine -> memory and hours, before anything is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sftmix.cli.commands import configuration
from sftmix.estimate.gpus import GPUS

ABOUT = """Say what `run` with these options will need: memory of each device, hours of each stage and of the whole.
Rows are read and tokenised; of the models only the config is read, so it takes seconds and no GPU.

  sftmix estimate --config recipe:alpaca-llama3.1-8b --gpu H100 --gpus 8
  sftmix estimate --model.path NAME --data.train rows.json --gpu cpu --tflops 0.2

Hours are FLOPs / (peak x MFU), or bytes / bandwidth where the GPUs send each other so much that it takes longer.
--mfu is a guess until a run of yours on such a machine has been measured, and --bandwidth is a data sheet's: what
nccl-tests says of your machine (busbw) is the figure to give."""

_OWN = [
    ("--gpu NAME", f"The device: {', '.join(GPUS)} or cpu.", "H100"),
    ("--gpus N", "How many of them; null: as many as a node has, 1 of cpu.", "null"),
    ("--gpus_per_node N", "GPUs of a node, which share the weights under training.parallel hsdp.", "8"),
    ("--mfu X", "Share of the peak that real tokens reach, in (0, 1].", "0.4"),
    ("--tflops X", "Peak of one device in TFLOP/s, in place of the known one.", "null"),
    (
        "--bandwidth X",
        "GB/s from one GPU to the others, in one direction; null: within a node the data sheet's, by NVLink or PCIe "
        f"({', '.join(f'{name} {gpu.bandwidth}' for name, gpu in GPUS.items())}), between nodes and for cpu none: "
        "communication is not counted.",
        "null",
    ),
    ("--json", "Print JSON instead of a table.", "false"),
]


def main(argv: Sequence[str]) -> None:
    """Parse, estimate, print."""

    def add(parser: Any) -> None:
        parser.add_argument("--gpu", type=str, default="H100")
        parser.add_argument("--gpus", type=int | None, default=None)
        parser.add_argument("--gpus_per_node", type=int, default=8)
        parser.add_argument("--mfu", type=float, default=0.4)
        parser.add_argument("--tflops", type=float | None, default=None)
        parser.add_argument("--bandwidth", type=float | None, default=None)
        parser.add_argument("--json", type=bool, default=False)

    names = ("gpu", "gpus", "gpus_per_node", "mfu", "tflops", "bandwidth", "json?")
    config, parsed = configuration("estimate", ABOUT, argv, own=_OWN, names=names, add=add)
    config.validate(needs_out=False)
    from sftmix.estimate import estimate, make_machine
    from sftmix.estimate.text import described

    machine = make_machine(
        parsed.gpu,
        parsed.gpus,
        mfu=parsed.mfu,
        tflops=parsed.tflops,
        per_node=parsed.gpus_per_node,
        bandwidth=parsed.bandwidth,
    )
    found = estimate(config, machine)
    print(json.dumps(found, indent=1) if parsed.json else described(found))
