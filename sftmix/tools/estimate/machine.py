"""The devices of a run, and how a stage lies on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sftmix.common.errors import ConfigError
from sftmix.common.gpus import GPUS
from sftmix.common.world import World
from sftmix.options import TrainingOptions
from sftmix.training.parallel import resolve_parallel, shard_group

FLOAT, HALF = 4, 2
"""Bytes of a float32 and of a bf16 number."""


@dataclass(frozen=True, slots=True)
class Machine:
    """`count` devices of one kind.

    flops      peak of one device, FLOP/s; None: unknown, and so are the hours
    memory     bytes of one device; None: unknown
    mfu        share of the peak that the FLOPs of real tokens reach, with padding and all other overheads
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
    def device(self) -> torch.device:
        return torch.device("cpu" if self.name == "cpu" else "cuda")


def make_machine(
    gpu: str, gpus: int | None, *, mfu: float, tflops: float | None, gpus_per_node: int, bandwidth: float | None
) -> Machine:
    """The machine that the options of the command line describe; ConfigError where one of them is not allowed.

    gpu        a name of the table, or cpu
    gpus       None: as many as a node has, or one CPU
    tflops     peak of one device, TFLOP/s; None: that of the table
    bandwidth  GB/s in one direction; None: that of the table, which holds within a node
    """
    known = GPUS.get(gpu)
    if known is None and gpu != "cpu":
        raise ConfigError(f"gpu is {gpu!r}; there are {', '.join(GPUS)} and cpu (--tflops gives another peak)")
    if gpus is None:
        gpus = gpus_per_node if known else 1
    numbers = {"gpus_per_node": gpus_per_node, "gpus": gpus, "mfu": mfu, "tflops": tflops, "bandwidth": bandwidth}
    for option, number in numbers.items():
        if number is not None and not 0 < number <= (1 if option == "mfu" else math.inf):
            raise ConfigError(f"{option} is {number}; allowed: above 0, and mfu at most 1")
    if known:
        tflops = tflops or known.tflops
        bandwidth = bandwidth or (known.bandwidth if gpus <= gpus_per_node else None)
    memory = known.gigabytes * 1e9 if known else None
    return Machine(gpu, gpus, tflops and tflops * 1e12, memory, mfu, gpus_per_node, bandwidth and bandwidth * 1e9)


class Layout(NamedTuple):
    """How the ranks of a stage share its weights, and in which numbers they compute.

    shards   number of parts of the weights, each on another rank; 1: each rank holds all
    copies   number of ranks, or groups of them, that hold the same weights
    size     bytes of a number in a matrix product
    """

    shards: int
    copies: int
    size: int


def layout_of(options: TrainingOptions, machine: Machine) -> Layout:
    """ConfigError for ranks that cannot be put into groups of training.shard_group_size."""
    count, device = machine.count, machine.device
    world = World(size=count, device=device, local_size=min(count, machine.per_node))
    parallel = resolve_parallel(options.parallel, world)
    shards = shard_group(options.shard_group_size, world) if parallel == "hsdp" else count if parallel == "fsdp" else 1
    fp32 = options.precision == "fp32" or (options.precision == "auto" and device.type == "cpu")
    return Layout(shards, count // shards, FLOAT if fp32 else HALF)
