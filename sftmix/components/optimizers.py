"""Optimizers: the update rule of a step. Learning rate, betas, epsilon and weight decay are options of `training`."""

from collections.abc import Mapping
from typing import Literal

from sftmix.components.base import Optimizer, decay_groups
from sftmix.components.component import Need
from sftmix.options import TrainingOptions
from sftmix.types import Tensor, TorchOptimizer


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101), the paper's, with float32 state: eight bytes per trained parameter."""

    def __init__(self, *, fused: bool | Literal["auto"] = "auto"):
        """fused: do the whole update in one pass over the memory: same rule, other rounding. auto: on CUDA."""
        self.fused = fused

    def build(self, parameters: Mapping[str, Tensor], *, training: TrainingOptions) -> TorchOptimizer:
        import torch

        groups, (beta1, beta2) = decay_groups(parameters, training.weight_decay), training.betas
        on_cuda = all(parameter.is_cuda for parameter in parameters.values())
        fused = on_cuda if self.fused == "auto" else self.fused
        return torch.optim.AdamW(
            groups, lr=training.learning_rate, betas=(beta1, beta2), eps=training.eps, fused=fused or None
        )


class AdamW8bit(Optimizer):
    """AdamW with blockwise 8-bit state by bitsandbytes (arXiv 2110.02861): two bytes per trained parameter, on a GPU.

    Parameters of fewer than 4,096 numbers keep float32 state. Ranks cannot share the weights, because
    blocks of the state do not follow the shards.
    """

    package = "bitsandbytes"
    needs = frozenset({Need.WHOLE_WEIGHTS})
    state_bytes = 2

    def build(self, parameters: Mapping[str, Tensor], *, training: TrainingOptions) -> TorchOptimizer:
        from bitsandbytes.optim import AdamW8bit as Blockwise  # type: ignore[import-not-found, import-untyped, unused-ignore]

        groups = decay_groups(parameters, training.weight_decay)
        return Blockwise(groups, lr=training.learning_rate, betas=tuple(training.betas), eps=training.eps)
