"""Ranks, devices and the three wrappings of one training module: none, DDP, FSDP2.

Gradients are averaged over ranks by both DDP and FSDP2, so the loop multiplies its sums by the world size and divides
by counts reduced over all ranks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from sftmix.errors import ConfigError, SFTMixError
from sftmix.training.layers import decoder_layers

if TYPE_CHECKING:
    from sftmix.training.step import TrainingModule
    from sftmix.training.values import Values

T = TypeVar("T")
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers. `rank` 0 writes; every rank computes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = _CPU
    local_size: int = 1
    """Ranks on this node."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, in float64."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(v) for v in total.tolist()]

    def max(self, value: float) -> float:
        """Largest value over ranks."""
        if self.size == 1:
            return value
        top = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        return float(top)

    def gather(self, value: Any) -> list[Any]:
        """One picklable object of every rank, on every rank (small ones: over the network only, never to a file)."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do `work` on rank 0 while the others wait; its error is everybody's error."""
        error, result = None, None
        if self.is_main:
            try:
                result = work()
            except SFTMixError as raised:
                error = raised
        error = self.share(error)
        if error is not None:
            error.everywhere = True
            raise error
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, then on the others, which find its caches filled."""
        result = self.on_main(work)
        return cast(T, result) if self.is_main else work()


@contextlib.contextmanager
def start_world() -> Iterator[World]:
    """Join the process group that torchrun announces, or be alone."""
    size, rank, local = (
        int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    device = _CPU
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:  # not torchrun
        yield World(device=device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, local, device, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        dist.barrier()  # a rank that leaves early can abort the others at exit
    finally:
        dist.destroy_process_group()


def resolve_parallel(requested: str, world: World) -> str:
    """auto -> none, ddp or fsdp."""
    if requested == "auto":
        requested = "none" if world.size == 1 else "fsdp" if world.device.type == "cuda" else "ddp"
    if requested == "ddp" and world.size == 1:
        return "none"
    return requested


def resolve_precision(requested: str, device: torch.device) -> str:
    """auto -> bf16 on a GPU that has it, else fp32."""
    if requested != "auto":
        return requested
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def wrap(
    module: TrainingModule,
    *,
    parallel: str,
    precision: str,
    world: World,
    shard_group_size: int | None = None,
    values: Values | None = None,
) -> nn.Module:
    """Wrap the module whose forward runs backbone, head and losses.

    fsdp, hsdp: one group per decoder layer and one for the rest (embeddings, norm, head), which is gathered once per
    forward and kept until the backward is done, so tied weights live in one group (T16). Each group is moved to the
    device as it is sharded. A model on the meta device has its `values` put into its shards: no rank holds it whole.
    """
    if parallel == "none":
        return module.to(world.device)
    if parallel == "ddp":
        module.to(world.device)
        ids = [world.device.index] if world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
    mesh = _mesh(parallel, shard_group_size, world)
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in decoder_layers(module.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # What enters the root is no activation: FSDP would look for floats inside Batch and Plan and round lambdas, weights
    # and scales of the loss to bf16 (a lambda above 1 - 2^-9 to 1). What flows in it is bf16 as its parameters are.
    policy = replace(policy, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for name in ("read", "probe"):
        register_fsdp_forward_method(module, name)
    if values is not None:
        values.fill(module.model)
        for check in values.checks:
            module.probe(check)
        cast(FSDPModule, module).reshard()  # the optimizer is made of the shards
    return module


def _mesh(parallel: str, shard_group_size: int | None, world: World) -> DeviceMesh:
    """fsdp: all ranks share one copy of the weights. hsdp: each group of so many neighbouring ranks shares one."""
    if not dist.is_initialized():
        raise ConfigError(f"training.parallel {parallel} needs torchrun (torchrun --nproc_per_node N cli.py ...)")
    if parallel == "fsdp":
        return init_device_mesh(world.device.type, (world.size,))
    group = shard_group(shard_group_size, world)
    return init_device_mesh(world.device.type, (world.size // group, group), mesh_dim_names=("replicate", "shard"))


def shard_group(shard_group_size: int | None, world: World) -> int:
    """Ranks that share one copy of the weights under hsdp; ConfigError where that does not divide their number."""
    group = shard_group_size or world.local_size
    if world.size % group:
        divisors = ", ".join(str(n) for n in range(1, world.size + 1) if world.size % n == 0)
        given = f"training.shard_group_size is {shard_group_size}"
        if shard_group_size is None:
            given = f"training.shard_group_size is null, which means the {group} ranks of this node"
        raise ConfigError(f"{given}, but there are {world.size} ranks; allowed: {divisors}")
    return group


@contextlib.contextmanager
def gradient_sync(wrapped: nn.Module, enabled: bool) -> Iterator[None]:
    """Around forward and backward: reduce gradients over ranks only on the last accumulation step (T18)."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if enabled else wrapped.no_sync():
            yield
        return
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(enabled)
    yield


def autocast(wrapped: nn.Module, precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast, except under FSDP, whose policy already computes in bf16."""
    fsdp = isinstance(wrapped, FSDPModule)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16" and not fsdp)


def unwrap(wrapped: nn.Module) -> TrainingModule:
    """The module inside DDP; FSDP2 changes the module in place, so there it is the module itself."""
    module = wrapped.module if isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped
    return cast("TrainingModule", module)
