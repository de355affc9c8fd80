"""The GPUs that `estimate` knows, in a module without torch, because the help of the command line reads it."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU by its maker's data sheet: dense bf16 peak, TFLOP/s; memory, GB; GB/s to the other GPUs of its node in one
    direction (sheets give the sum of both), by NVLink, or by PCIe without NVLink."""

    tflops: float
    gigabytes: float
    bandwidth: float


GPUS = {
    "B200": Gpu(2250, 180, 900),
    "H200": Gpu(989, 141, 450),
    "H100": Gpu(989, 80, 450),
    "A100-80GB": Gpu(312, 80, 300),
    "A100-40GB": Gpu(312, 40, 300),
    "L40S": Gpu(362, 48, 32),
    "RTX-4090": Gpu(165, 24, 32),
}
