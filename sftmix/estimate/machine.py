"""What a run is to be made on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sftmix.errors import ConfigError
from sftmix.training.distributed import World

TERA, GIB = 1e12, 2**30

GPUS: dict[str, tuple[float, float]] = {
    "B200": (2250, 180),
    "H200": (989, 141),
    "H100": (989, 80),
    "A100-80GB": (312, 80),
    "A100-40GB": (312, 40),
    "L40S": (362, 48),
    "RTX-4090": (165, 24),
}
"""Dense bf16 peak in TFLOP/s and memory in GB, from the makers' data sheets."""
CPU = "cpu"
PER_NODE = 8
"""GPUs of a node where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Machine:
    """`count` devices of one kind.

    flops    peak of one device, FLOP/s; None: unknown, and with it the hours
    memory   bytes of one device; None: unknown
    mfu      share of the peak that the FLOPs of real tokens reach, padding and all overheads included
    per_node devices of one node
    """

    name: str
    count: int
    flops: float | None
    memory: float | None
    mfu: float
    per_node: int = PER_NODE

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.is_cpu else "cuda")

    @property
    def world(self) -> World:
        """What a rank of a run on this machine sees of it."""
        return World(size=self.count, device=self.device, local_size=min(self.count, self.per_node))

    def hours(self, flops: float) -> float | None:
        """Device-hours for so many FLOPs."""
        return None if self.flops is None else flops / (self.flops * self.mfu) / 3600


def make_machine(name: str, count: int, *, mfu: float, tflops: float | None, per_node: int = PER_NODE) -> Machine:
    """A machine of the table, or `cpu`; `tflops` takes the place of the table's peak. ConfigError for anything else."""
    if name not in (*GPUS, CPU):
        raise ConfigError(f"gpu is {name!r}; there are {', '.join(GPUS)} and {CPU} (--tflops gives another peak)")
    if count < 1:
        raise ConfigError(f"gpus is {count}; allowed: at least 1")
    if per_node < 1:
        raise ConfigError(f"gpus_per_node is {per_node}; allowed: at least 1")
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu is {mfu}; allowed: above 0 and at most 1")
    if tflops is not None and not tflops > 0:
        raise ConfigError(f"tflops is {tflops}; allowed: above 0")
    peak, gigabytes = GPUS.get(name, (None, None))
    peak = tflops or peak
    return Machine(name, count, peak and peak * TERA, gigabytes and gigabytes * 1e9, mfu, per_node)
