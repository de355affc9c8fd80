"""This process among the other ranks: its rank and device, and messages between ranks."""

import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sftmix.ranks.launcher import BY_TORCHRUN, PATIENCE, end_with_launcher, launch_problem
from sftmix.words.ends import RANK_0, end_of
from sftmix.words.errors import ConfigError, HangError, RankError, SFTMixError, Stopped

T = TypeVar("T")

_CPU = torch.device("cpu")
_process_group: list[object] = []
"""The process group, so that no DDP module is the last to hold it. Such a module, freed with the traceback of an error,
would destroy the group while it holds the interpreter's lock, and hang: it waits for gloo's thread, which waits for the
lock to free a tensor (torch 2.13). Freed through this reference, the group gives the lock back first."""

_starts = itertools.count()
"""Numbers the process groups of this process; each rank makes as many."""

_SHOWN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""Environment variables that name the GPUs a process may use: of NVIDIA, of AMD (two) and of Intel."""


@dataclass(frozen=True)
class World:
    """This process among the other ranks. Every rank computes; only `rank` 0 writes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = _CPU
    local_size: int = 1
    """Ranks on this node."""
    store: dist.Store | None = None
    """Where a rank leaves its error before its connections close."""
    timeout: float = 1800.0
    """Seconds that a rank waits for another one."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over ranks, in float64.

        This method and those below exchange values of the host, by gloo: it does not wait for the GPU, and it raises an
        error if a rank hangs, where NCCL would end the process.
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
        """Return the values of all ranks, on every rank: small objects, which are pickled for the network alone."""
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
        if error := self.share(error):
            raise error
        return result

    def from_main(self, work: Callable[[], T]) -> T:
        """Return, on every rank, what `work` returns on rank 0; raise its error on every rank."""
        return self.share(self.on_main(work))

    def node_first(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank of each node, then on the others, which find the cache of their node filled.

        An error of any node is raised on every rank; its message names the node, unless all nodes have the same error.
        """
        first = self.local_rank == 0
        result, error = _attempt(work) if first else (None, None)
        answers = self.gather((socket.gethostname(), error) if first else None)
        nodes = [(rank, *answer) for rank, answer in enumerate(answers) if answer is not None]
        for node, (rank, host, error) in enumerate(nodes):
            if error:
                if len({str(other) for *_, other in nodes}) > 1:
                    error.args = (f"node {node} ({host}, from rank {rank}): {error}",)  # hosts may share a name
                raise error
        return result if first else work()  # type: ignore[return-value]

    def explained(self, error: BaseException) -> BaseException:
        """Return the error to report for one that ended the work of this rank; it is noted for the others.

        If another rank has noted one before, this rank's broken connection, or the signal by which torchrun ends it,
        says nothing of the cause: that is a RankError. A rank that waited in vain gets a HangError.
        """
        if self.store is None or isinstance(error, (RankError, HangError, KeyboardInterrupt)):
            return error
        # gloo has no class: "[.../gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 3000ms for send ...",
        # "[.../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:19347: Connection reset by peer ..." (torch 2.13)
        broken = isinstance(error, dist.DistError) or "gloo" in str(error)
        if broken and "Timed out waiting" in str(error):
            return HangError(
                f"another rank did not answer within {self.timeout:g} s (training.timeout): it hangs, or its work "
                "takes longer; the same command continues from the last checkpoint"
            )
        with contextlib.suppress(dist.DistError):  # the store is gone with the rank that had it
            if not (broken or isinstance(error, Stopped)):
                end = end_of(error)
                self.store.compare_set("error", "", f"{end.code} rank {self.rank}: {end.words}")  # the first one stays
                if self.is_main:
                    self.store.set("error of rank 0", end.words)
                elif end.speaker == RANK_0 and BY_TORCHRUN not in os.environ:
                    error.everywhere = self._rank_0_has(end.words)  # type: ignore[attr-defined]
            elif self.store.check(["error"]):
                code, _, words = self.store.get("error").decode().partition(" ")
                error = RankError(words)
                error.exit_code = int(code)
        return error

    def _rank_0_has(self, words: str) -> bool:
        """Wait until rank 0 ends with an error; return True if its words are the same. False: it has none in time."""
        assert self.store is not None
        with contextlib.suppress(dist.DistStoreError):
            self.store.wait(["error of rank 0"], timedelta(seconds=PATIENCE))
            return self.store.get("error of rank 0").decode() == words
        return False


def _attempt(work: Callable[[], T]) -> tuple[T | None, SFTMixError | Stopped | None]:
    """Return the result of `work` and None, or None and the error that every rank raises."""
    try:
        return work(), None
    except (SFTMixError, Stopped) as error:
        error.everywhere = True
        return None, error  # any other error ends this rank at once, and `explained` tells the others


def _joined(world: World) -> World:
    """Say on each node but the first, which says all else, that it has joined."""
    if world.rank and not world.local_rank:
        ranks = f"ranks {world.rank} to {world.rank + world.local_size - 1} of {world.size}"
        print(f"{socket.gethostname()} has joined with {ranks}; rank 0 says how the run goes on", file=sys.stderr)
    return world


@contextlib.contextmanager
def start_world(timeout: float = 1800.0) -> Iterator[World]:
    """Join the process group that torchrun announces; without torchrun, yield a world of one rank.

    A rank ends when its torchrun is gone. After an error on a GPU the process group is left to the end of the process.

    timeout  seconds after which ranks that wait for another one give up
    Raises ConfigError for variables that do not fit together, HangError if other ranks do not come.
    """
    end_with_launcher()
    if problem := launch_problem():
        raise ConfigError(problem)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local)
    if "RANK" not in os.environ:  # not torchrun
        yield World(device=device)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kind = device.type
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    try:
        # Each group has keys of its own: those of an earlier one are addresses where nobody listens any more.
        meeting = _meeting(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], timeout)
        store = dist.PrefixStore(f"group {next(_starts)}", meeting)
        _refuse_other_devices(kind, rank, size, store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        raise HangError(
            f"rank {rank} of {size} (RANK, WORLD_SIZE) did not meet the others at MASTER_ADDR:MASTER_PORT; each is a "
            f"process of its own, which torchrun starts, and training.timeout is {timeout:g} s. {error}"
        ) from error
    _process_group[:] = [dist.group.WORLD]
    finished = False
    try:
        given = os.environ.get("LOCAL_WORLD_SIZE")  # without it: of 16 ranks 2 have the local number 0, so 8 a node
        world = World(rank, size, local, device, store=store, timeout=timeout)
        local_size = size // world.gather(local).count(0) if given is None else int(given)
        yield _joined(replace(world, local_size=local_size))
        dist.barrier()  # if one rank leaves early, the others can abort at exit
        finished = True
    except BaseException as error:
        if (explained := world.explained(error)) is error:
            raise
        raise explained from error
    finally:
        # Shutting NCCL down waits for kernels, which wait for other ranks. After an error of this rank it may last to
        # the timeout: torchrun would not hear of the error, nor end the other ranks. Other GPUs may be alike.
        if finished or kind == "cpu":
            dist.destroy_process_group()


def _refuse_other_devices(kind: str, rank: int, size: int, store: dist.Store) -> None:
    """Raise ConfigError on every rank unless all compute on one kind of device, by which each decides for itself."""
    store.set(f"device {rank}", f"{kind} on {socket.gethostname()}")
    devices = [found.decode() for found in store.multi_get([f"device {other}" for other in range(size)])]
    if len(one_of_each := {device.split()[0]: device for device in devices}) > 1:
        raise ConfigError(
            f"ranks are on devices of different kinds: {', '.join(sorted(one_of_each.values()))}. A node that shows no "
            "GPU counts as cpu: mend its driver or its container, or leave it out"
        )


@cache
def _meeting(address: str, port: str, timeout: float) -> dist.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT, torchrun's or rank 0's; it lasts as long as the process."""
    return next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))[0]


def accelerator() -> torch.device:
    """Return the kind of GPU of this machine, without a number, or the CPU; a Mac's (mps) has no float64."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return _CPU if kind is None or kind.type == "mps" else kind


def _device(local_rank: int) -> torch.device:
    """Return the GPU of this rank, or the CPU. If a scheduler shows each rank its own GPU alone, this is number 0."""
    kind = accelerator()
    if kind == _CPU:
        return _CPU
    gpus = torch.accelerator.device_count()
    bound = gpus == 1 and any(name in os.environ for name in _SHOWN)
    if local_rank >= gpus and not bound:
        problem = ConfigError(
            f"rank {local_rank} of this node has no GPU: the node shows {gpus}, and each rank needs one of its own; "
            f"start {gpus} ranks on it (torchrun --nproc_per_node {gpus})"
        )
        problem.everywhere = False  # the first rank has one, and waits
        raise problem
    index = 0 if bound else local_rank
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)
