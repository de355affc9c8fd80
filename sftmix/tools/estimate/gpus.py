"""The GPUs whose speed is known, in a module without torch, because the help of the command line reads it."""

import re

GPUS = {
    "B200": (2250, 180),
    "H200": (989, 141),
    "H100-PCIe": (756, 80),
    "H100-NVL": (835, 94),
    "H100": (989, 80),
    "A100-80GB": (312, 80),
    "A100-40GB": (312, 40),
    "L40S": (362, 48),
    "RTX-4090": (165, 24),
}
"""Name -> dense bf16 peak, TFLOP/s; memory, GB. All are of the makers' data sheets."""

MFU = 0.4
"""Share of the peak that is taken for reached before anything was measured."""


def gpu_named(device: str) -> str | None:
    """Return the name above of a device as its driver calls it, such as NVIDIA A100-SXM4-80GB; None: not known."""
    words = {*re.split(r"\W", device)}  # NVIDIA, A100, SXM4, 80GB; NVIDIA GeForce RTX 4090: RTX, 4090
    # Whole words: an NVIDIA L40 is no L40S, a GH200 no H200.
    found = next((name for name in GPUS if words.issuperset(name.split("-"))), None)
    return found if words.isdisjoint({"Laptop", "MIG", "D"}) else None  # slower ones of a name
