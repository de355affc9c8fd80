"""Optimizers: the update rule of a step. Learning rate, betas, epsilon and weight decay are options of `training`."""

from collections.abc import Mapping
from typing import Literal

from sftmix.components.base import Optimizer, decay_groups
from sftmix.options.training import TrainingOptions
from sftmix.types import Tensor, TorchOptimizer


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101), the paper's, with float32 state: eight bytes per trained parameter."""

    def __init__(self, *, fused: bool | Literal["auto"] = "auto"):
        """fused: do the whole update in one pass over the memory: same rule, other rounding. auto: on CUDA."""
        self.fused = fused

    def build(self, parameters: Mapping[str, Tensor], *, training: TrainingOptions) -> TorchOptimizer:
        import torch

        from sftmix.functional.adamw import BlockwiseAdamW

        groups, (beta1, beta2) = decay_groups(parameters, training.weight_decay), training.betas
        on_cuda = all(parameter.is_cuda for parameter in parameters.values())
        fused = on_cuda if self.fused == "auto" else self.fused
        # a DTensor, as under fsdp, is no torch.Tensor by type
        whole_on_cpu = all(type(one.data) is torch.Tensor and one.is_cpu for one in parameters.values())
        # fused False would also forbid foreach: of None torch chooses (2.13)
        kind = torch.optim.AdamW if fused or not whole_on_cpu else BlockwiseAdamW
        return kind(groups, lr=training.learning_rate, betas=(beta1, beta2), eps=training.eps, fused=fused or None)
