"""What a run is to be made on, and how a stage lies on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sftmix.common.errors import ConfigError
from sftmix.common.gpus import GPUS
from sftmix.common.world import World
from sftmix.options import SHARDED, TrainingOptions
from sftmix.training.parallel import resolve_parallel, shard_group

CPU = "cpu"
FLOAT, HALF = 4, 2

Compute = Literal["float32", "autocast", "bfloat16"]
"""float32; bf16 autocast over float32 weights; or bf16 weights (FSDP's policy), with which all is bf16."""


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
    per_node: int
    bandwidth: float | None

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

    def hours(self, flops: float, sent: float) -> float:
        """Device-hours for so many FLOPs of all while each device sends so many bytes: the longer, not the sum.

        FSDP gathers a layer while the one before it computes, DDP sends gradients while the backward goes on. Where
        they hide each other badly it is too little, by half at most.
        """
        return max(self.computing(flops) or 0.0, self.communicating(sent) or 0.0) * self.count / 3600


def make_machine(
    name: str, count: int | None, *, mfu: float, tflops: float | None, per_node: int = 8, bandwidth: float | None = None
) -> Machine:
    """A machine of the table, or `cpu`; ConfigError for anything else.

    count      None: a node of GPUs, or one CPU
    tflops     takes the place of the table's peak
    bandwidth  GB/s in one direction, in place of the table's, which holds within a node
    """
    known = GPUS.get(name)
    if known is None and name != CPU:
        raise ConfigError(f"gpu is {name!r}; there are {', '.join(GPUS)} and {CPU} (--tflops gives another peak)")
    if count is None:
        count = per_node if known else 1
    for option, number in (("gpus_per_node", per_node), ("gpus", count)):
        if number < 1:
            raise ConfigError(f"{option} is {number}; allowed: at least 1")
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu is {mfu}; allowed: above 0 and at most 1")
    for option, value in (("tflops", tflops), ("bandwidth", bandwidth)):
        if value is not None and not value > 0:
            raise ConfigError(f"{option} is {value}; allowed: above 0")
    if known:
        tflops = tflops or known.tflops
        bandwidth = bandwidth or (known.bandwidth if count <= per_node else None)
    memory = known.gigabytes * 1e9 if known else None
    return Machine(name, count, tflops and tflops * 1e12, memory, mfu, per_node, bandwidth and bandwidth * 1e9)


@dataclass(frozen=True, slots=True)
class Layout:
    """How ranks work together (none, ddp, fsdp or hsdp), into how many parts they divide the weights, and what these
    are computed in."""

    parallel: str
    shards: int
    compute: Compute

    @property
    def is_sharded(self) -> bool:
        return self.parallel in SHARDED

    @property
    def size(self) -> int:
        """Bytes of a number in a matrix product."""
        return FLOAT if self.compute == "float32" else HALF


def make_layout(options: TrainingOptions, machine: Machine) -> Layout:
    """ConfigError for ranks that cannot be put into groups of training.shard_group_size."""
    parallel, shards = resolve_parallel(options.parallel, machine.world), 1
    if parallel in SHARDED:
        shards = machine.count if parallel == "fsdp" else shard_group(options.shard_group_size, machine.world)
    if options.precision == "fp32" or (options.precision == "auto" and machine.is_cpu):
        return Layout(parallel, shards, "float32")
    return Layout(parallel, shards, "bfloat16" if parallel in SHARDED else "autocast")
