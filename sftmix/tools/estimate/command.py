"""The command `estimate`: memory and hours of a run on some machine, before anything is started."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sftmix.cli.parsing import configuration
from sftmix.cli.say import wrapped
from sftmix.tools.runs.output import rendered
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
    """B200, H200, H100-PCIe, H100-NVL, H100, A100-80GB, A100-40GB, L40S, RTX-4090 or cpu; null: this machine."""
    gpus: int | None = None
    """How many; null: as many as this machine has; of a named kind 8, of cpu 1."""
    mfu: float = MFU
    """Share of the peak that token slots reach, padding included, in (0, 1]."""
    tflops: float | None = None
    """Peak of one device in TFLOP/s, in place of the known one; null: that one."""
    json: bool = False
    """Print JSON instead of a table."""


def main(name: str, argv: Sequence[str]) -> None:
    """Parse, estimate, print."""
    config, values = configuration(name, ABOUT, argv, EstimateOptions, needs_out=False)
    from sftmix.tools.runs.start import check_names_given

    check_names_given(config)
    from sftmix.tools.estimate.run import Machine, estimate

    options = vars(values)
    as_json = options.pop("json")
    needs = estimate(config, Machine(**options))
    columns = shutil.get_terminal_size().columns
    print(json.dumps(needs, indent=1) if as_json else wrapped(described(needs), columns))


def described(estimate: Mapping[str, Any]) -> str:
    """The whole, a table of the stages, and the parts of their memory, as the template of this room says it."""
    from sftmix.training.plan import USABLE

    # A timedelta is shown as "3 days, 4:12:00".
    return rendered(
        "estimate/needs.md", lasting=lambda hours: timedelta(seconds=round(3600 * hours)), usable=USABLE, **estimate
    )
