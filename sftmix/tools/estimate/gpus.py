"""The GPUs that `estimate` knows, in a module without torch, because the help of the command line reads it."""

GPUS = {
    "B200": (2250, 180, 900),
    "H200": (989, 141, 450),
    "H100": (989, 80, 450),
    "A100-80GB": (312, 80, 300),
    "A100-40GB": (312, 40, 300),
    "L40S": (362, 48, 32),
    "RTX-4090": (165, 24, 32),
}
"""Name -> dense bf16 peak, TFLOP/s; memory, GB; GB/s to the other GPUs of its node in one direction, by NVLink, or by
PCIe without NVLink. All are of the makers' data sheets, which give the sum of both directions."""
