"""The command `estimate`: memory and hours of a run on some machine, before anything is started."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sftmix.cli.parsing import OwnOption, configuration
from sftmix.common.gpus import GPUS

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
        "GB/s from one GPU to the others, in one direction; null: within a node the data sheet's, by NVLink or PCIe "
        f"({', '.join(f'{name} {gpu.bandwidth}' for name, gpu in GPUS.items())}), between nodes and for cpu none: "
        "communication is not counted.",
    ),
    OwnOption("json", bool, False, "", "Print JSON instead of a table."),
)


def main(argv: Sequence[str]) -> None:
    """Parse, estimate, print."""
    config, values = configuration("estimate", ABOUT, argv, _OPTIONS, needs_out=False)
    from sftmix.pipeline.start import check_names_given

    check_names_given(config)
    from sftmix.tools.estimate.run import estimate, make_machine
    from sftmix.tools.estimate.text import described

    options = vars(values)
    as_json = options.pop("json")
    needs = estimate(config, make_machine(**options))
    print(json.dumps(needs, indent=1) if as_json else described(needs))
