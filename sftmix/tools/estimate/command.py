"""The command `estimate`: memory and hours of a run on some machine, before anything is started."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftmix.cli.parsing import configuration
from sftmix.tools.runs.shown import rendered
from sftmix.training.gpus import MFU

ABOUT = """Say what `run` with these options will need: memory of each device, hours of each stage and of the whole.
Rows are read and tokenised; of the models only the config is read, so it takes seconds and no GPU.

  sftmix estimate --config recipe:alpaca-llama3.1-8b --gpu H100 --gpus 8
  sftmix estimate --model.path NAME --data.train rows.json --tflops 0.2

Hours are FLOPs / (peak x MFU); what GPUs send each other is not counted. --mfu is a guess until a run of yours on such
a machine has been measured."""


@dataclass(kw_only=True)
class EstimateOptions:
    gpu: str | None = None
    """B200, H200, H100, A100-80GB, A100-40GB, L40S, RTX-4090 or cpu; null: this machine."""
    gpus: int | None = None
    """How many; null: as many as this machine or a node has, 1 of cpu."""
    gpus_per_node: int = 8
    """GPUs of a node, which share the weights under training.parallel hsdp."""
    mfu: float = MFU
    """Share of the peak that token slots reach, padding included, in (0, 1]."""
    tflops: float | None = None
    """Peak of one device in TFLOP/s, in place of the known one; null: that one."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: Sequence[str]) -> None:
    """Parse, estimate, print."""
    config, values = configuration("estimate", ABOUT, argv, EstimateOptions, needs_out=False)
    from sftmix.tools.runs.start import check_names_given

    check_names_given(config)
    from sftmix.tools.estimate.run import Machine, estimate

    options = vars(values)
    as_json = options.pop("json")
    needs = estimate(config, Machine(**options))
    print(json.dumps(needs, indent=1) if as_json else described(needs))


def described(estimate: Mapping[str, Any]) -> str:
    """A table of the stages, the parts of their memory, and the whole, as the template of this room says it."""
    return rendered("estimate/needs.md", lasting=lasting, **estimate)


def lasting(hours: float) -> str:
    """Return a time in its two largest units: 3 days 4 h, 2 h 5 min, 14 min 3 s."""
    seconds, words = round(3600 * hours), list[str]()
    for size, unit in ((86400, " days"), (3600, " h"), (60, " min"), (1, " s")):
        count, seconds = divmod(seconds, size)
        if count or words:
            words.append(f"{count}{unit}")
    return " ".join(words[:2]) or "under 1 s"
