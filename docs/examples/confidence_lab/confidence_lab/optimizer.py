from collections.abc import Callable, Mapping
from typing import Any

import torch

from sftmix.components import Optimizer
from sftmix.components.optimizers import decay_groups
from sftmix.options import TrainingOptions


class Lion(Optimizer):
    """The sign of an interpolated momentum (arXiv 2302.06675): four bytes of state per trained parameter."""

    def __init__(self, *, beta1: float = 0.9, beta2: float = 0.99):
        """
        beta1: share of the momentum in the update.
        beta2: share of the momentum that is kept.
        """
        self.beta1, self.beta2 = beta1, beta2

    def build(self, parameters: Mapping[str, torch.Tensor], *, training: TrainingOptions) -> torch.optim.Optimizer:
        groups = decay_groups(parameters, training.weight_decay)
        return _Lion(groups, {"lr": training.learning_rate, "beta1": self.beta1, "beta2": self.beta2})


class _Lion(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = torch.lerp(parameter.grad, momentum, group["beta1"])
                parameter.add_(torch.sign(update), alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - group["beta2"])
                state["updates"] = state.get("updates", 0) + 1
