"""AdamW without temporaries, for a CPU."""

from typing import Any

import torch


class AdamWInPlace(torch.optim.AdamW):
    """torch's AdamW of one tensor after the other: its operations in its order, with the same bits.

    A gradient is the temporary of its own update, and gone after it; torch has two temporaries as large as a weight.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; no closure is called."""
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                step = state["step"].item()
                of_rank = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                weight, gradient, first, second = (getattr(x, "to_local", lambda x=x: x)() for x in of_rank)
                weight.mul_(1 - rate * group["weight_decay"])
                first.lerp_(gradient, 1 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                root = torch.sqrt(second, out=gradient).div_((1 - beta2**step) ** 0.5).add_(group["eps"])
                weight.addcdiv_(first, root, value=-(rate / (1 - beta1**step)))
                parameter.grad = None
