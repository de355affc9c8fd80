"""Memory of a stage: its peak, and what is missing before its first step."""

import contextlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule

from sftmix.batches.order import TokenisedRows
from sftmix.common.errors import ConfigError
from sftmix.options.training import DEFAULT_MICRO_BATCH
from sftmix.training.parallel import autocast, unwrap
from sftmix.training.step import StepSetup

GIB = 2**30
MEASURED = 256
"""Most tokens of the longest row on which activations are measured; they grow with the tokens."""
ACTIVATIONS = 0.75
"""Share of what is free beside gradients and optimizer that a forward may keep: the loss and the kernels take more."""
CGROUP = Path("/sys/fs/cgroup")


def check_memory(setup: StepSetup, say: Callable[[str], object] = print) -> None:
    """Compare what the stage will take on this rank with what is free; weights, which are loaded, count in neither.

    Raises ConfigError if the gradients and the optimizer alone do not fit. Says which micro-batch fits if the
    activations of the largest one do not: those are measured by the forward of the longest row, or of its beginning,
    and not at all if they are recomputed.
    """
    stage = setup.stage
    free = -setup.world.max(-free_memory(setup.world.device))  # of the rank that has least: all ranks decide alike
    if math.isinf(free) or isinstance(setup.module, FSDPModule):
        return
    state, update = _held(setup)
    if state + update > free:
        raise ConfigError(
            f"{stage.name}: gradients and optimizer take {(state + update) / GIB:.1f} GiB, and {free / GIB:.1f} GiB "
            "are free. Train adapters (--model.lora.r 16), a smaller model, shard it over GPUs (--training.parallel "
            "fsdp), or on a GPU update without a copy (--optimizer AdamW --optimizer.fused true)"
        )
    if stage.options.activation_checkpointing:
        return
    constant, per_row = saved_by_forward(setup.module, stage.data, setup.precision)
    batch = stage.order.batch(0)
    unit = max(map(len, batch))  # 2: a pair is never cut apart
    examples, _ = stage.options.limits(setup.world.device.type)
    rows = min(examples or 0, unit * math.ceil(len(batch) / setup.world.size))
    if not rows or state + constant + rows * per_row <= free:
        return
    fitting = int((free - state - constant) / per_row) // unit * unit
    remedy = f"--training.micro_batch_size {fitting}" if fitting > 0 else "--training.activation_checkpointing true"
    activations = constant + rows * per_row
    say(
        f"{stage.name}: {rows} rows as long as the longest one take {activations / GIB:.1f} GiB, beside "
        f"{state / GIB:.1f} GiB of gradients and optimizer, and {free / GIB:.1f} GiB are free; use {remedy}"
    )


def tokens_that_fit(setup: StepSetup) -> int:
    """Return the most token slots of a micro-batch for which this rank has memory, at least 1.

    Where a forward is not measured they are those of DEFAULT_MICRO_BATCH rows as long as the longest one.
    """
    stage, free = setup.stage, free_memory(setup.world.device)
    longest = int(stage.data.lengths.max())
    if math.isinf(free) or isinstance(setup.module, FSDPModule) or stage.options.activation_checkpointing:
        return DEFAULT_MICRO_BATCH * longest
    constant, per_row = saved_by_forward(setup.module, stage.data, setup.precision)
    left = ACTIVATIONS * (free - sum(_held(setup))) - constant
    return max(1, int(left / per_row * longest))


def _held(setup: StepSetup) -> tuple[float, int]:
    """Return the bytes of gradients and optimizer that are still to come, and those that only an update takes."""
    trained = [one for one in setup.stage.model.parameters() if one.requires_grad]
    numbers, optimizer = sum(one.numel() for one in trained), setup.stage.optimizer
    state = numbers * optimizer.state_bytes
    if not isinstance(setup.module, nn.parallel.DistributedDataParallel):  # whose buckets have the gradients by now
        state += sum(one.nbytes for one in trained)
    # On a GPU torch's AdamW copies its second moments for an update, unless it is fused.
    copies = setup.world.device.type != "cpu" and getattr(optimizer, "fused", None) is False
    return state, 4 * numbers * copies


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


def saved_by_forward(module: nn.Module, data: TokenisedRows, precision: str) -> tuple[float, float]:
    """Return the bytes that the backbone's forward keeps for its backward: constant ones, and the longest row's.

    The constant part is weights in another dtype. The model is in eval mode, so no random number is drawn.
    """
    target = unwrap(module)
    decoder = target.model.get_decoder()
    was_training = target.training
    weights = {one.untyped_storage().data_ptr() for one in target.parameters()}
    longest = data[int(data.lengths.argmax())].input_ids
    part = longest[:MEASURED]
    device = next(target.parameters()).device
    target.eval()

    def kept(length: int) -> int:
        sizes = dict[int, int]()

        def note(saved: torch.Tensor) -> torch.Tensor:
            storage = saved.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return saved.detach()  # an output would hold the graph that holds it, and so the weights, for ever

        ids = torch.from_numpy(part[:length]).long()[None].to(device)
        with autocast(module, precision, device), saved_tensors_hooks(note, lambda saved: saved):
            decoder(input_ids=ids, use_cache=False)
        return sum(sizes.values())

    half = len(part) // 2
    whole_kept = kept(len(part))
    per_token = (whole_kept - kept(max(half, 1))) / max(len(part) - half, 1)
    target.train(was_training)
    return max(whole_kept - per_token * len(part), 0), per_token * len(longest)


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
