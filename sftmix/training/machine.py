"""The machines that make a stage, which decide how its sums are rounded."""

import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch.nn import attention

import sftmix
from sftmix.options.training import LAYOUT, TrainingOptions
from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError

Machine = dict[str, Any]
"""What decides how sums are rounded: if it is equal, the same steps give the same bits.

A stage may be made on several machines, one after the other. Its record is a list in the order of the steps, and each
entry has `after`, the step after which that machine went on.
"""


DECIDED = ("activation_checkpointing", "compile", "micro_batch_tokens", "reduce_each_micro_batch")
"""Options of LAYOUT that may be auto until `choices.decide`; a record has what was decided."""

WRAPPED = ("parallel", "reshard_after_forward", "padding_free")
"""Options that may be auto until the module is wrapped."""


def machine_of(world: World, options: TrainingOptions) -> Machine:
    """Return versions, the device of rank 0, threads and ranks, and the options of LAYOUT.

    cuda  the version of CUDA or ROCm, or the kind of another GPU; None if the device is a CPU
    """
    device, gpu, info = world.device, world.device.type != "cpu", Path("/proc/cpuinfo")
    # Libraries choose by the model of the CPU how they multiply matrices.
    # "model name\t: AMD EPYC"
    named = re.search(r"^model name.*?:(.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    model = named[1].strip() if named else platform.processor() or platform.machine()
    cpu = f"cpu {model} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "sftmix": sftmix.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cuda": (torch.version.cuda or torch.version.hip or device.type) if gpu else None,
        "device": torch.get_device_module(device).get_device_name(device) if gpu else cpu,
        "threads": torch.get_num_threads(),
        "ranks": world.size,
        **{name: getattr(options, name) for name in LAYOUT},
    }


def of_before(machine: Machine) -> Machine:
    """Return a record with the options of LAYOUT that are newer than it, by their defaults: so it was made."""
    return {name: getattr(TrainingOptions, name) for name in LAYOUT} | machine


def going_on(recorded: Sequence[Machine], step: int, machine: Machine) -> list[Machine]:
    """Return the record of a stage that goes on after `step` on this machine."""
    if recorded and {**recorded[-1], **machine} == recorded[-1]:  # it has `after` beside what a machine has
        return [*recorded]
    return [*recorded, {"after": step, **machine}]


def decided_before(recorded: Sequence[Machine], machine: Machine) -> Machine:
    """Return the options that are auto here as the machine recorded last had them, if it is this one in all else."""
    last = recorded[-1] if recorded else {}
    # {compile: True} if this machine has made steps with it, and auto is what is asked for now.
    had = {name: last.get(name) for name in DECIDED + WRAPPED if machine.get(name) == "auto"}
    return had if {**last, **machine, **had} == last else {}


WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""A variable that cuBLAS reads when it starts; some values give it memory enough to add in one order."""


@contextmanager
def adding_in_order(wanted: bool | Literal["auto"]) -> Iterator[None]:
    """Switch torch's deterministic algorithms on or off, and back again; auto: leave them as they are.

    Memory is not filled with NaN then, as torch would do before each use: no result depends on what was there.

    Raises ConfigError if CUDA has started without WORKSPACE, and they are wanted.
    """
    own = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module whose attribute torch declares nowhere
    filled = memory.fill_uninitialized_memory
    if wanted is True and WORKSPACE not in os.environ:
        if torch.cuda.is_initialized():
            raise ConfigError(
                f"training.deterministic true needs the variable {WORKSPACE}=:4096:8 before CUDA starts, and it has "
                "started: set it in the environment of the process"
            )
        os.environ[WORKSPACE] = ":4096:8"
    if wanted != "auto":
        torch.use_deterministic_algorithms(wanted)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(own[0], warn_only=own[1])
        memory.fill_uninitialized_memory = filled


@contextmanager
def flash_kernels(wanted: Literal["torch", "FA3"], device: torch.device) -> Iterator[None]:
    """Let torch's flash attention be FlashAttention 3, and torch's own again afterwards.

    Raises ConfigError if the GPU, torch or the packages do not have it.
    """
    if wanted == "torch":
        yield
        return
    needs = (
        "training.flash_kernels FA3 needs a Hopper GPU (sm90), a torch with this switch, and the package flash_attn_3"
    )
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if not hopper or not hasattr(attention, "activate_flash_attention_impl"):
        raise ConfigError(f"{needs}; here: {device.type}, torch {torch.__version__}")
    try:
        attention.activate_flash_attention_impl(wanted)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{needs}: {error}") from error
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()
