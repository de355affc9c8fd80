"""Products of routed experts in the precision of a step: autocast casts for linear layers, but not for grouped_mm.

transformers knows it as experts_implementation autocast_grouped_mm. Weights are cast where they are used, before
transformers asks for their dtype: its products in compiled layers are grouped in bfloat16 alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

GROUPED = "grouped_mm"
CASTING = "autocast_grouped_mm"


class _Cast:
    """Experts whose tensors have another dtype; the delta of an adapter is in them then."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts = experts
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def compute(experts: Any, states: Tensor, *chosen: Tensor) -> Tensor:
    """Return what the experts make of states [T, D], with their chosen numbers and weights [T, k]; [T, D]."""
    device = states.device.type
    if torch.is_autocast_enabled(device):
        experts = _Cast(experts, torch.get_autocast_dtype(device))
    return ALL_EXPERTS_FUNCTIONS[GROUPED](experts, states, *chosen)


ExpertsInterface.register(CASTING, compute)


def cast_experts(model: PreTrainedModel) -> None:
    """Let the experts of a model compute in the dtype of autocast, in place, unless they do already."""
    if model.config._experts_implementation == GROUPED:  # eager's linear layers and batched_mm are autocast's
        model.set_experts_implementation(CASTING)


def expert_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of experts, [experts, D, D'], that `compute` casts."""
    parts = (part for part in model.modules() if hasattr(part, "is_transposed"))  # all whose experts are exchangeable
    return [one for part in parts for one in part.parameters(recurse=False) if one.dim() == 3]
