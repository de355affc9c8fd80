"""Memory of a stage: what fits into what is free, said before its first step, and the peak that was."""

import contextlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from sftmix.batches.deal import deal
from sftmix.common.errors import ConfigError
from sftmix.components.component import Need
from sftmix.options import TrainingOptions
from sftmix.options.training import DEFAULT_MICRO_BATCH
from sftmix.training.footprint import Count, Footprint, memory_of, unit_of
from sftmix.training.machine import Machine, machine_of, tokens_before
from sftmix.training.parallel import PADDED_TOKENS, pads, unwrap
from sftmix.training.step import StepSetup

GIB = 2**30
USABLE = 0.9
"""Share of the free memory for which micro-batches are made: kernels have workspaces, and free memory has gaps."""
CGROUP = Path("/sys/fs/cgroup")


def settled(setup: StepSetup, memory: Footprint, free: float) -> TrainingOptions:
    """Return the options of the stage with what `free` bytes decide on a GPU in the place of auto.

    Activations are recomputed if the micro-batch that is asked for, or a pair, does not fit without that; not if the
    objective changes states of layers.
    """
    options, changed = setup.stage.options, dict[str, Any]()
    if options.activation_checkpointing == "auto":
        asked = _asked(setup, options.micro_batch_size or 1)
        without = memory.slots(USABLE * free, most=asked, several=True, recompute=False)
        changed["activation_checkpointing"] = without < asked and Need.STATES not in setup.stage.objective.needs
    if options.limits(setup.world.device.type)[1] == "auto":
        changed["micro_batch_tokens"] = _fitting(setup, memory, free, **changed)
    return replace(options, **changed)


def _fitting(setup: StepSetup, memory: Footprint, free: float, activation_checkpointing: bool | None = None) -> int:
    """Return the most token slots of a micro-batch, at least of a pair of the longest rows, at most of a rank's part.

    activation_checkpointing  None: as the stage has it
    """
    recompute = activation_checkpointing or setup.stage.options.activation_checkpointing is True
    most = _asked(setup, sys.maxsize)
    return max(_asked(setup, 1), memory.slots(USABLE * free, most=most, several=True, recompute=recompute))


def _asked(setup: StepSetup, rows: int) -> int:
    """Return the token slots of so many of the longest rows: at least of a unit, at most of a rank's part of a step."""
    units, unit = setup.stage.order.batch(0), unit_of(setup)
    of_rank = unit * math.ceil(len(units) / setup.world.size)
    return min(max(rows, unit), of_rank) * int(setup.stage.data.lengths.max())


def tokens_that_fit(setup: StepSetup) -> int:
    """Return the most token slots of a micro-batch that fits beside weights, gradients and optimizer on every rank.

    At least those of a pair of the longest rows, at most those of a rank's part of a global batch of such rows.
    """
    free = room(setup)
    if math.isinf(free):
        return _asked(setup, DEFAULT_MICRO_BATCH)
    return int(-setup.world.max(-_fitting(setup, memory_of(setup), free)))


def limit_tokens(setup: StepSetup, recorded: Sequence[Machine]) -> None:
    """Put a number in the place of micro_batch_tokens auto: the recorded one, or the largest that fits every rank.

    No larger one than a global batch needs, so that it is the same again if the memory is more than enough. Says what
    length groups cost a GPU.

    recorded  the machines that made the steps so far
    """
    stage, world, options = setup.stage, setup.world, setup.stage.options
    say = print if world.is_main else lambda said: None
    if world.device.type != "cpu" and (options.length_groups or 1) > 1:
        say(
            f"training.length_groups {options.length_groups}: each micro-batch is up to so many passes, which cost a "
            "GPU more than the padding of short rows; leave it out, or set training.padding_free true"
        )
    if options.limits(world.device.type)[1] != "auto":
        return
    tokens = world.share(tokens_before(recorded, machine_of(world, options)))
    if tokens is None:
        tokens = min(tokens_that_fit(setup), PADDED_TOKENS if pads(setup.module, stage.data.lengths) else sys.maxsize)
        say(f"{stage.name}: training.micro_batch_tokens auto is {tokens}")
    setup.stage = replace(stage, options=replace(options, micro_batch_tokens=tokens))


def check_memory(setup: StepSetup, say: Callable[[str], object] = print) -> None:
    """Compare what the steps will take on this rank with what is free; weights, which are loaded, count in neither.

    Raises ConfigError if the gradients and the optimizer alone do not fit. Says which micro-batch fits if the
    activations of the largest one do not.
    """
    stage, world, options = setup.stage, setup.world, setup.stage.options
    free = room(setup)
    if math.isinf(free):
        return
    memory, recompute = memory_of(setup), options.activation_checkpointing is True
    batch, lengths, one_row = stage.order.batch(0), stage.data.lengths, unwrap(setup.module).padding_free
    dealt = deal(batch, lengths, options, ranks=world.size, device=world.device, padding_free=one_row)
    how = {"several": len(dealt) > 1 or isinstance(setup.module, DDP), "recompute": recompute}
    gradients, _, working = memory.peak(0, **how)
    state = memory.optimizer + gradients + working
    if state > free:
        raise ConfigError(
            f"{stage.name}: gradients and optimizer take {state / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free. "
            "Train adapters (--model.lora.r 16), a smaller model, shard it over GPUs (--training.parallel fsdp), or on "
            "a GPU update without a copy (--optimizer AdamW --optimizer.fused true)"
        )
    examples, tokens = options.limits(world.device.type)
    slots = min(_asked(setup, examples or sys.maxsize), tokens if isinstance(tokens, int) else sys.maxsize)
    fitting = memory.slots(free, most=slots, **how)
    if fitting == slots:
        return
    unit, longest = unit_of(setup), int(lengths.max())
    rows = fitting // longest // unit * unit
    remedy = f"--training.micro_batch_size {rows}"
    if not rows:
        remedy = "--model.lora.r 16" if recompute else "--training.activation_checkpointing true"
    gradients, activations, working = memory.peak(slots, **how)
    say(
        f"{stage.name}: micro-batches of {slots:,} token slots, {slots // longest} rows as long as the longest one, "
        f"take {(activations + working) / GIB:.1f} GiB beside {(memory.optimizer + gradients) / GIB:.1f} GiB of "
        f"gradients and optimizer, and {free / GIB:.1f} GiB are free; use {remedy}"
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
