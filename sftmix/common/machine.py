"""The machine that computes: where the same numbers can be expected, bit for bit."""

from __future__ import annotations

import torch

from sftmix.common.world import World


def machine_of(world: World) -> dict[str, str | int]:
    """Return what decides how sums are rounded here: the version of torch, the device of rank 0, threads and ranks."""
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": str(torch.__version__),
        "device": device,
        "threads": torch.get_num_threads(),
        "ranks": world.size,
    }
