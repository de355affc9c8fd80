"""The GPUs whose speed is known, in a module without torch, because the help of the command line reads it."""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """Figures of a maker's data sheet.

    tflops     dense bf16 peak, TFLOP/s
    gigabytes  memory, GB
    memory     its bandwidth, TB/s
    link       NVLink, or else PCIe, to the GPUs of the node: GB/s of both directions together
    """

    tflops: float
    gigabytes: float
    memory: float
    link: float


GPUS = {
    "B200": Gpu(2250, 180, 8.0, 1800),
    "H200": Gpu(989, 141, 4.8, 900),
    "H100-PCIe": Gpu(756, 80, 2.0, 128),
    "H100-NVL": Gpu(835, 94, 3.9, 128),
    "H100": Gpu(989, 80, 3.35, 900),
    "A100-80GB": Gpu(312, 80, 2.0, 600),
    "A100-40GB": Gpu(312, 40, 1.55, 600),
    "L40S": Gpu(362, 48, 0.86, 64),
    "RTX-4090": Gpu(165, 24, 1.01, 64),
}
"""Name -> figures."""

NETWORK = 50e9
"""Bytes a second that each GPU sends to other nodes: 400 Gbit/s, as in a DGX H100."""

MFU = 0.4
"""Share of the peak that is taken for reached before anything was measured."""


def gpu_named(device: str) -> str | None:
    """Return the name above of a device as its driver calls it, such as NVIDIA A100-SXM4-80GB; None: not known."""
    words = {*re.split(r"\W", device)}  # NVIDIA, A100, SXM4, 80GB; NVIDIA GeForce RTX 4090: RTX, 4090
    # Whole words: an NVIDIA L40 is no L40S, a GH200 no H200.
    found = next((name for name in GPUS if words.issuperset(name.split("-"))), None)
    return found if words.isdisjoint({"Laptop", "MIG", "D"}) else None  # slower ones of a name
