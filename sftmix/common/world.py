"""This process among the other ranks: its rank and device, and messages between ranks."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sftmix.common.errors import ConfigError, HangError, SFTMixError, Stopped
from sftmix.common.launcher import end_with_launcher

T = TypeVar("T")

_CPU = torch.device("cpu")
_kept: list[object] = []
"""The process group, so that it outlives all else that holds it. A DDP module that goes last, with the traceback of an
error, would destroy it while it holds the interpreter's lock, wait for gloo's thread, which waits for that lock to free
a tensor, and hang (torch 2.13). This reference gives the lock back first."""

_SHOWN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""Variables that name the GPUs which a process may use: of NVIDIA, of AMD (two) and of Intel."""


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
        """Return the sums over ranks, in float64.

        These and the next are numbers of the host: gloo sends them without a wait for the GPU, and can tell a hang,
        where NCCL ends the process.
        """
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, value: float) -> float:
        """Return the largest value over ranks."""
        if self.size == 1:
            return value
        top = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        return float(top)

    def gather(self, value: T) -> list[T]:
        """Return one picklable object of every rank, on every rank; small ones, which go over the network only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """Return rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do `work` on rank 0 while the others wait; raise its error on every rank."""
        result, error = _attempt(work) if self.is_main else (None, None)
        _raise_everywhere(self.share(error))
        return result

    def from_main(self, work: Callable[[], T]) -> T:
        """Return, on every rank, what `work` returns on rank 0; raise its error on every rank."""
        return self.share(self.on_main(work))

    def node_first(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank of each node, then on the others, which find the cache of their node filled.

        An error of any node is raised on every rank; its message names the node, unless all nodes have the same.
        """
        first = self.local_rank == 0
        result, error = _attempt(work) if first else (None, None)
        ranks = self.gather((socket.gethostname(), error) if first else None)
        nodes = [(rank, *of_node) for rank, of_node in enumerate(ranks) if of_node is not None]
        for node, (rank, host, error) in enumerate(nodes):
            if isinstance(error, SFTMixError) and len({str(of_node[2]) for of_node in nodes}) > 1:
                error = type(error)(f"node {node} ({host}, from rank {rank}): {error}")  # hosts may share a name
            _raise_everywhere(error)
        return result if first else work()  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, SFTMixError | Stopped | None]:
    try:
        return work(), None
    except (SFTMixError, Stopped) as error:
        return None, error


def _raise_everywhere(error: SFTMixError | Stopped | None) -> None:
    if error is not None:
        error.everywhere = True
        raise error


@contextlib.contextmanager
def start_world(timeout: float = 1800.0) -> Iterator[World]:
    """Join the process group that torchrun announces; without torchrun, yield a world of one rank.

    A rank ends when its torchrun is gone. After an error on a GPU the process group stays: this process is to end.

    timeout  seconds after which ranks that wait for another one give up
    """
    end_with_launcher()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local)
    if "RANK" not in os.environ:  # not torchrun
        yield World(device=device)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    kind = device.type
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    _kept[:] = [dist.group.WORLD]
    ended = False
    try:
        yield World(rank, size, local, device, local_size)
        dist.barrier()  # if one rank leaves early, the others can abort at exit
        ended = True
    except RuntimeError as error:
        if "Timed out waiting" not in str(error):  # gloo has no class for this error
            raise
        raise HangError(
            f"another rank did not answer within {timeout:g} s (training.timeout): it hangs, or does what takes "
            "longer; the same command continues from the last checkpoint"
        ) from error
    finally:
        # A shutdown of NCCL waits for kernels, which wait for other ranks: after an error of one rank it may wait until
        # its timeout, and torchrun, which ends the others, would not hear of the error. So may those of other makers.
        if ended or kind == "cpu":
            dist.destroy_process_group()


def accelerator() -> torch.device:
    """Return the kind of GPU of this machine, without a number, or the CPU; a Mac's GPU (mps) has no float64."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return _CPU if kind is None or kind.type == "mps" else kind


def _device(local_rank: int) -> torch.device:
    """Return the GPU of this rank, or the CPU; a scheduler may show each rank a single GPU, its own."""
    kind = accelerator()
    if kind == _CPU:
        return _CPU
    gpus = torch.accelerator.device_count()
    bound = gpus == 1 and any(name in os.environ for name in _SHOWN)
    if local_rank >= gpus and not bound:
        raise ConfigError(
            f"rank {local_rank} of this node has no GPU: the node shows {gpus}, and each rank needs one of its own; "
            f"start {gpus} ranks on it (torchrun --nproc_per_node {gpus})"
        )
    index = 0 if bound else local_rank
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)
