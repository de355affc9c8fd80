"""How a stage lies on a machine: who holds the weights, and what they are computed in."""

from __future__ import annotations

from dataclasses import dataclass

from sftmix.common.errors import ConfigError
from sftmix.components.base import Optimizer
from sftmix.config.checks import quantized_shards, sharded_optimizer
from sftmix.estimate.machine import Machine
from sftmix.estimate.trace import Compute
from sftmix.options import SHARDED, LoraOptions, TrainingOptions
from sftmix.training.parallel import resolve_parallel, shard_group

FLOAT, HALF = 4, 2


@dataclass(frozen=True, slots=True)
class Layout:
    """parallel: none, ddp, fsdp or hsdp; shards: into how many parts the weights are divided."""

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
    bf16 = options.precision == "bf16" or (options.precision == "auto" and not machine.is_cpu)
    compute: Compute = "float32" if not bf16 else "bfloat16" if parallel in SHARDED else "autocast"
    return Layout(parallel, shards, compute)


def check_sharded(layout: Layout, options: TrainingOptions, lora: LoraOptions, optimizer: Optimizer) -> None:
    """Refuse what a run refuses when it knows that ranks share the weights."""
    named = f"training.parallel {options.parallel} (here {layout.parallel})"
    if layout.is_sharded and not optimizer.shards:
        raise ConfigError(sharded_optimizer(optimizer, named))
    if layout.is_sharded and lora.quantize:
        raise ConfigError(quantized_shards(lora, named))
