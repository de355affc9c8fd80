"""Memory of a stage: what fits into what is free, said before its first step, and the peak that was."""

import contextlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from sftmix.batches.deal import deal
from sftmix.common.errors import ConfigError
from sftmix.training.footprint import Count, Footprint, slots_of
from sftmix.training.parallel import unwrap
from sftmix.training.step import StepSetup

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


def check_memory(setup: StepSetup, say: Callable[[str], object] = print, memory: Footprint | None = None) -> None:
    """Compare what the steps will take on this rank with what is free; weights, which are loaded, count in neither.

    Raises ConfigError if the gradients and the optimizer alone do not fit. Says which micro-batch fits if the
    activations of the largest one do not.

    memory  what a step takes; None: it is measured
    """
    stage, world, options = setup.stage, setup.world, setup.stage.options
    free = room(setup)
    if math.isinf(free):
        return
    memory, recompute = memory or Footprint(setup), options.activation_checkpointing is True
    layout: Any = {"ranks": world.size, "device": world.device, "padding_free": unwrap(setup.module).padding_free}
    dealt = deal(stage.order.batch(0), stage.data.lengths, options, **layout)
    how = {"several": len(dealt) > 1, "recompute": recompute}
    gradients, _, working = memory.peak(0, **how)
    state = memory.optimizer + gradients + working
    if state > free:
        raise ConfigError(
            f"{stage.name}: gradients and optimizer take {state / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free. "
            "Train adapters (--model.lora.r 16), a smaller model, shard it over GPUs (--training.parallel fsdp), or on "
            "a GPU update without a copy (--optimizer AdamW --optimizer.fused true)"
        )
    examples, tokens = options.limits(world.device.type)
    slots = min(slots_of(setup, examples or sys.maxsize), tokens if isinstance(tokens, int) else sys.maxsize)
    fitting = memory.slots(free, most=slots, **how)
    if fitting == slots:
        return
    longest, of_unit = int(stage.data.lengths.max()), slots_of(setup, 1)
    if fitting >= of_unit:
        remedy = f"--training.micro_batch_size {fitting // of_unit * of_unit // longest}"
    else:
        remedy = "--model.lora.r 16" if recompute else "--training.activation_checkpointing true"
    say(
        f"micro-batches of {slots:,} token slots, {slots // longest} rows as long as the longest one, "
        f"take {memory.taken(slots, **how) / GIB:.1f} GiB with gradients and optimizer, and {free / GIB:.1f} GiB are "
        f"free; use {remedy}"
    )


def room(setup: StepSetup) -> float:
    """Return the bytes that each rank may still take, weights being there: those of the rank that has least."""
    world = setup.world
    free = free_memory(world.device) / (world.local_size if world.device.type == "cpu" else 1)
    if isinstance(setup.module, DDP):  # whose buckets have the gradients by now
        free += 4 * Count(setup.module.parameters()).trained
    return -world.max(-free)


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
    return sum(map(int, re.findall(rf"^(?:{names}):?\s+(\d+)", file.read_text(), re.MULTILINE)))


class PeakMemory:
    """Peak bytes since construction: of the GPU's allocator, or resident memory of this process on CPU.

    Memory resident at construction counts, and so do mapped files that were read. Use one at a time: a new one restarts
    the count. If the system cannot restart it (not Linux), the peak counts from the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        if self._device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self._device)
        status = Path("/proc/self/status")
        if status.exists() and (peak := _sum_in(status, "VmHWM")):
            return 1024 * peak
        if sys.platform == "win32":
            return 0  # not known
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
