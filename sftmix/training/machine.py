"""The record of what decides how sums are rounded: where it is equal, the same steps give the same bits."""

from __future__ import annotations

import torch

from sftmix.common.world import World
from sftmix.options import LAYOUT, TrainingOptions


def machine_of(world: World, options: TrainingOptions) -> dict[str, str | int | bool | None]:
    """Return the version of torch, the device of rank 0, threads and ranks, and the options of LAYOUT."""
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": str(torch.__version__),
        "device": device,
        "threads": torch.get_num_threads(),
        "ranks": world.size,
        **{name: getattr(options, name) for name in LAYOUT},
    }
