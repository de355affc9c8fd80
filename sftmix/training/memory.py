"""Memory of a stage: what is free, what must fit into it before its first step, and the peak that was."""

import contextlib
import math
import re
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from sftmix.training.numbers import Count, teacher_bytes
from sftmix.training.parallel import shards_of, unwrap
from sftmix.training.step import StepSetup
from sftmix.words.errors import ConfigError

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


def check_memory(setup: StepSetup) -> None:
    """Raise ConfigError if gradients and optimizer alone do not fit into what is free on this rank, before any step.

    Weights, which are loaded, count in neither. FSDP holds whole gradients between the micro-batches of a step, if a
    mean step has several, unless each reduces its own.
    """
    stage, world, free = setup.stage, setup.world, room(setup)
    options = stage.options
    trained, shards = Count(setup.module.parameters()).trained, shards_of(options, world)
    rows, tokens = options.limits(world.device.type)
    rows_of_rank = options.global_batch_size / world.size
    tokens_of_rank = rows_of_rank * float(stage.data.lengths.mean())
    several = rows_of_rank > (rows or math.inf) or tokens_of_rank > float(tokens or math.inf)
    whole = several and not options.reduce_each_micro_batch
    second = 0 if setup.teacher else teacher_bytes(stage.objective, unwrap(setup.module).model)  # else it is there
    # a float32 gradient
    state = trained * (4 / (1 if whole else shards) + (stage.optimizer.state_bytes + second) / shards)
    if state > free:
        each = "reduce gradients in each micro-batch (--training.reduce_each_micro_batch true), "
        raise ConfigError(
            f"{stage.name}: gradients and optimizer take {state / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free. "
            f"Train adapters (--model.lora.r 16), a smaller model, {each * (whole and shards > 1)}"
            "or shard it over GPUs (--training.parallel fsdp)"
        )


def room(setup: StepSetup) -> float:
    """Return the bytes that each rank may still take, weights being there: those of the rank that has least."""
    world = setup.world
    free = free_memory(world.device) / (world.local_size if world.device.type == "cpu" else 1)
    if isinstance(setup.module, DDP):  # whose buckets have the gradients by now
        free += 4 * Count(setup.module.parameters()).trained
    return -world.max(-free)  # the least of all ranks


def free_memory(device: torch.device) -> float:
    """Return the bytes that a process may still take on the device; infinity: not known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, which uses it again
        return torch.cuda.mem_get_info(device)[0] + kept
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return math.inf
    free = 1024 * _sum_in(info, "MemAvailable|SwapFree")
    limit = CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        files = _sum_in(CGROUP / "memory.stat", "inactive_file|active_file")  # the kernel drops them
        free = min(free, int(most) - int((CGROUP / "memory.current").read_text()) + files)
    return free


def _sum_in(file: Path, names: str) -> int:
    """Return the sum of the numbers of these names, which | divides."""
    # "MemAvailable:   19500120 kB" of meminfo, "inactive_file 4096" of memory.stat
    return sum(map(int, re.findall(rf"^(?:{names}):?\s+(\d+)", file.read_text(), re.MULTILINE)))


class PeakMemory:
    """Peak bytes since construction: of the GPU's allocator, or resident memory of this process on CPU.

    Memory resident at construction counts, and so do mapped files that were read. Use one at a time: a new one restarts
    the count. On a CPU only Linux counts it; elsewhere it is 0, not known.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now

    def bytes(self) -> int:
        if self._device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self._device)
        status = Path("/proc/self/status")
        return 1024 * _sum_in(status, "VmHWM") if status.exists() else 0  # "VmHWM:\t  391844 kB"
