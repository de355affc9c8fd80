"""Optimizers: the update rule of a step. Learning rate, betas, epsilon and weight decay are options of `training`."""

import re
from collections.abc import Mapping
from typing import Literal

from sftmix.components.base import Optimizer
from sftmix.options.training import TrainingOptions
from sftmix.types import Tensor, TorchOptimizer

# experts.gate_up_proj_bias (gpt-oss), self_attn.q_norm (Cohere), final_layer_norm, norm1, mixer.A_log, mixer.D (Mamba);
# not mlp.D or normalizer. GPT-2's ln_1 is a vector, which needs no name
NOT_DECAYED = re.compile(r"bias|(^|[._])(layer|rms)?norm\d*([._]|$)|(^|\.)(A_log|D)$", re.IGNORECASE)
"""Names of biases and norms, which some models have as matrices (of experts, of heads), and of state-space models."""


def decay_groups(parameters: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, object]]:
    """Return parameter groups: matrices decay; vectors, and what is a bias or a norm by its name, do not."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in parameters.items():
        (matrices if p.ndim >= 2 and not NOT_DECAYED.search(name) else others).append(p)
    groups = ({"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


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
