"""The way of tensors to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on `device`, without waiting for it."""
    pinned = values.pin_memory() if device.type in ("cuda", "xpu") else values  # other memory is copied at once
    return pinned.to(device, non_blocking=True)
