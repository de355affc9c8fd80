"""What a run is to be made on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sftmix.common.errors import ConfigError
from sftmix.common.gpus import GPUS
from sftmix.common.world import World

GIGA, TERA, GIB = 1e9, 1e12, 2**30


CPU = "cpu"
PER_NODE = 8
"""GPUs of a node where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Machine:
    """`count` devices of one kind.

    flops      peak of one device, FLOP/s; None: unknown, and with it the hours
    memory     bytes of one device; None: unknown
    mfu        share of the peak that the FLOPs of real tokens reach, padding and all overheads included
    per_node   devices of one node
    bandwidth  of one device to the others in one direction, bytes/s; None: unknown, communication takes no time
    """

    name: str
    count: int
    flops: float | None
    memory: float | None
    mfu: float
    per_node: int = PER_NODE
    bandwidth: float | None = None

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

    def computing(self, flops: float) -> float | None:
        """Seconds on all devices for so many FLOPs."""
        return None if self.flops is None else flops / (self.flops * self.mfu * self.count)

    def communicating(self, sent: float) -> float | None:
        """Seconds in which each device sends so many bytes and receives as many."""
        return None if self.bandwidth is None else sent / self.bandwidth

    def hours(self, flops: float, sent: float) -> float | None:
        """Device-hours for so many FLOPs (of all devices) while each device sends so many bytes.

        The longer of the two, not their sum: FSDP gathers a layer while the one before it computes, DDP sends gradients
        while the backward goes on, and the MFU of a run that was measured has in it what could not be hidden. So it is
        too little where they hide each other badly, by half at most.
        """
        computing, communicating = self.computing(flops), self.communicating(sent)
        return None if computing is None else max(computing, communicating or 0.0) * self.count / 3600


def make_machine(
    name: str,
    count: int | None,
    *,
    mfu: float,
    tflops: float | None,
    per_node: int = PER_NODE,
    bandwidth: float | None = None,
) -> Machine:
    """A machine of the table, or `cpu`; ConfigError for anything else.

    count      None: a node of GPUs, or one CPU
    tflops     takes the place of the table's peak
    bandwidth  GB/s in one direction, in place of the table's, which holds within a node
    """
    if name not in (*GPUS, CPU):
        raise ConfigError(f"gpu is {name!r}; there are {', '.join(GPUS)} and {CPU} (--tflops gives another peak)")
    if per_node < 1:
        raise ConfigError(f"gpus_per_node is {per_node}; allowed: at least 1")
    if count is None:
        count = 1 if name == CPU else per_node
    if count < 1:
        raise ConfigError(f"gpus is {count}; allowed: at least 1")
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu is {mfu}; allowed: above 0 and at most 1")
    for option, value in (("tflops", tflops), ("bandwidth", bandwidth)):
        if value is not None and not value > 0:
            raise ConfigError(f"{option} is {value}; allowed: above 0")
    known = GPUS.get(name)
    if known is None:
        return Machine(name, count, tflops and tflops * TERA, None, mfu, per_node, bandwidth and bandwidth * GIGA)
    if bandwidth is None and count <= per_node:
        bandwidth = known.bandwidth
    peak, memory = (tflops or known.tflops) * TERA, known.gigabytes * GIGA
    return Machine(name, count, peak, memory, mfu, per_node, bandwidth and bandwidth * GIGA)
