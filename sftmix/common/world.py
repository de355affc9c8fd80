"""This process among the other ranks: its rank and device, and messages between ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from sftmix.common.errors import HangError, SFTMixError, Stopped
from sftmix.common.launcher import end_with_launcher

T = TypeVar("T")

_CPU = torch.device("cpu")
_TIMED_OUT = "Timed out waiting"
"""Words of gloo, which has no class for this error."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among the other ranks. Every rank computes; only `rank` 0 writes."""

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
        """Return the sums over ranks, in float64."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(v) for v in total.tolist()]

    def max(self, value: float) -> float:
        """Return the largest value over ranks."""
        if self.size == 1:
            return value
        top = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        return float(top)

    def gather(self, value: T) -> list[T]:
        """Return one picklable object of every rank, on every rank; small ones, which go over the network only."""
        if self.size == 1:
            return [value]
        out: list[T | None] = [None] * self.size
        dist.all_gather_object(out, value)
        return cast(list[T], out)

    def share(self, value: Any) -> Any:
        """Return rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do `work` on rank 0 while the others wait; raise its error on every rank."""
        error: SFTMixError | Stopped | None = None
        result = None
        if self.is_main:
            try:
                result = work()
            except (SFTMixError, Stopped) as raised:
                error = raised
        error = self.share(error)
        if error is not None:
            error.everywhere = True
            raise error
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, then on the other ranks, which find the caches filled."""
        result = self.on_main(work)
        return cast(T, result) if self.is_main else work()


@contextlib.contextmanager
def start_world(timeout: float = 1800.0) -> Iterator[World]:
    """Join the process group that torchrun announces; without torchrun, yield a world of one rank.

    A rank ends when its torchrun is gone.

    timeout  seconds after which ranks that wait for another one give up
    """
    end_with_launcher()
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
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield World(rank, size, local, device, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        dist.barrier()  # if one rank leaves early, the others can abort at exit
    except RuntimeError as error:
        if _TIMED_OUT not in str(error):
            raise
        raise HangError(
            f"another rank did not answer within {timeout:g} s (training.timeout): it hangs, or does what takes "
            "longer; the same command continues from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()
