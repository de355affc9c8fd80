"""The node of the graph that hands out gradients which the fused pass has computed together with the loss.

They are those of states and head alone: `check_constants` refuses other inputs that ask for a gradient.
"""

from typing import Any

import torch
from torch import Tensor


def check_constants(**inputs: Any) -> None:
    """Raise ValueError for inputs that require a gradient, in grad mode: a loss takes them as constants."""
    learnt = [name for name, x in inputs.items() if getattr(x, "requires_grad", False)]
    if learnt and torch.is_grad_enabled():
        raise ValueError(
            f"{', '.join(learnt)} would get no gradient: all but hidden, weight and bias are constants of the loss; "
            "detach them"
        )


def scaled(gradient: Tensor, factor: Tensor, keep: bool, kernels: Any) -> Tensor:
    """Return gradient times factor, a scalar on its device, of float32 or better; unless `keep`, in place.

    In place because a second [V, D] would be the peak of the memory; and a factor of 1 then costs no pass.
    """
    if keep:
        return factor * gradient.to(factor.dtype)
    if kernels is not None:
        kernels.scale(gradient, factor)
    elif type(factor) is not Tensor or not factor.is_cpu or factor != 1:  # a fake one has no value to compare
        gradient.mul_(factor)
    return gradient


class GradientsInForward(torch.autograd.Function):
    """A node of the graph that gives a loss the gradients computed together with it."""

    @staticmethod
    def forward(ctx, loss, gradients, kernels, *inputs):
        ctx.gradients = gradients
        ctx.kernels = kernels
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # what was computed has no graph: a second derivative would leave this loss out
            raise RuntimeError(
                "sft_loss has no second derivative, which create_graph=True asks for: use reference_sft_loss."
            )
        if ctx.gradients is None:
            raise RuntimeError("sft_loss: backward a second time; pass retain_graph=True to the first one.")
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        gradients = [None if g is None else scaled(g, upstream, keep, ctx.kernels) for g in ctx.gradients]
        if not keep:
            ctx.gradients = None
        return None, None, None, *gradients  # autograd casts them to the dtypes of the inputs
