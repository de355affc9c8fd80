"""The node of the graph that gives a loss the gradients computed together with it, chunk by chunk."""

from __future__ import annotations

import torch


class GradientsInForward(torch.autograd.Function):
    """A node of the graph that gives a loss the gradients computed together with it."""

    @staticmethod
    def forward(ctx, loss, gradients, *inputs):
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.save_for_backward(*inputs)  # so that double backward finds them, and fails
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError("sft_loss: backward a second time; pass retain_graph=True to the first one.")
        if keep := _graph_is_kept():
            scaled = [None if g is None else g * upstream for g in ctx.gradients]
        else:  # in place: a second [V, D] would be the peak of the memory
            scaled = [None if g is None else g.mul_(upstream) for g in ctx.gradients]
            ctx.gradients = None
        if keep and torch.is_grad_enabled():  # create_graph: add a node that fails on a second derivative
            inputs = [x for x in ctx.saved_tensors if x is not None]
            scaled = [None if g is None else _NoSecondDerivative.apply(g, upstream, *inputs) for g in scaled]
        return None, None, *(g if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True))


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.detach()

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError("sft_loss has no second derivative: use reference_sft_loss for double backward.")


def _graph_is_kept() -> bool:
    """Return True if the running backward keeps its graph, or if this torch cannot tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()
