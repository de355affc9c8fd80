"""A measurement of what Mixup does to the training: its gradient beside NTP's, and its loss by lambda."""

import math
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from sftmix.components.base import Callback, CallbackResult, Objective, StageState
from sftmix.components.component import Need, require
from sftmix.components.view import LossView
from sftmix.types import Batch, Plan, Tensor

SHARES = (50, 60, 70, 80, 90)
"""Per cent: lower ends of the bins of the larger share max(lambda, 1 - lambda); the last bin ends at 1."""


class MeasureMixing(Callback):
    """Every so many steps, compare NTP and Mixup on the examples of the step, under the weights after it.

    With g_ntp and g_mix the gradients of both terms of the loss by the input of the LM head, over all response tokens:

        mixing_cosine          g_ntp . g_mix / (|g_ntp| |g_mix|); 1: Mixup pulls where NTP does, 0: elsewhere
        mixing_gradient_share  |g_mix| / (|g_ntp| + |g_mix|), mu included
        mixing_unreached       share of the response tokens that no pair reaches
        mixing_loss_50 .. _90  mean Mixup loss (nats) of the token pairs whose larger share, max(lambda, 1 - lambda),
                               is at least so many percent, and less than the next
        mixing_seconds         what this measurement took: a forward of the model, and three passes through the head

    Steps that mix nothing, and stages without Mixup, have none of these. In eval mode: no dropout.
    """

    needs = frozenset({Need.MIXED_HEAD_INPUTS})
    gives = frozenset()

    def __init__(self, *, every: int = 50):
        """every: optimizer steps between measurements, at least 1; one costs about half a step."""
        require(every >= 1, "callbacks.MeasureMixing.every", every, "1 and above")
        self.every = every

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        if state.step % self.every or not state.metrics.get("mixup_tokens") or not (state.read and state.objective):
            return None
        started = time.perf_counter()
        sums: Any = Counter()
        for part in state.read(partial(_sums, state.objective)):  # of all micro-batches of all ranks
            sums.update(part)
        # What is divided by a zero is zero itself, but for tokens, of which repeats alone have none.
        ntp, mix = (math.sqrt(sums[name]) / (sums[f"{name}_count"] or 1) for name in ("ntp", "mix"))
        figures = {
            "mixing_cosine": sums["both"] / (math.sqrt(sums["ntp"] * sums["mix"]) or 1),
            "mixing_gradient_share": mix / (ntp + mix or 1),
            "mixing_unreached": 1 - sums["reached"] / sums["tokens"] if sums["tokens"] else 0.0,
        }
        for low in SHARES:
            if sums["pairs", low]:
                figures[f"mixing_loss_{low}"] = sums["losses", low] / sums["pairs", low]
        return CallbackResult({**figures, "mixing_seconds": time.perf_counter() - started})


def _sums(objective: Objective, hidden: Tensor, head: Any, batch: Batch, plan: Plan) -> dict[Any, float]:
    """Return sums over one micro-batch: products of both gradients, counts, and Mixup losses by bin.

    hidden [T, D], the input of the LM head. The gradients are of sums over tokens, not yet divided by a count.
    """
    import torch

    plan = replace(plan, prompt_weight=None)  # Mixup never reaches the prompts' tokens
    ntp, _ = _gradient(objective, hidden, head, batch, plan.without_pairs())
    mix, losses = _gradient(objective, hidden, head, batch, replace(plan, row_weight=torch.zeros_like(plan.row_weight)))
    once = batch.ntp_weight[batch.slot] > 0  # repeats of an example, and fillers of idle ranks, count nowhere
    reached = torch.zeros_like(once)
    reached[batch.pairs.flatten()] = True
    sums = {
        "ntp": float((ntp * ntp).sum()),
        "mix": float((mix * mix).sum()),
        "both": float((ntp * mix).sum()),
        "ntp_count": plan.ntp_count,
        "mix_count": plan.ntp_count if plan.mixup_mean == "ntp" else plan.mixup_count,
        "tokens": float(once.sum()),
        "reached": float((reached & once).sum()),
    }
    larger = torch.maximum(plan.lam, 1 - plan.lam)
    for low in SHARES:
        inside = (larger >= low / 100) & (larger < (low + 10) / 100 if low < 90 else True)  # bool[M]
        sums |= {("pairs", low): float(inside.sum()), ("losses", low): float(losses[inside].double().sum())}
    return sums


def _gradient(objective: Objective, hidden: Tensor, head: Any, batch: Batch, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return f64[T, D], the gradient of the plan's loss by the hidden states, and the Mixup losses [M] of its pairs."""
    import torch

    bias = None if head.bias is None else head.bias.detach()
    frozen = SimpleNamespace(weight=head.weight.detach(), bias=bias, softcap=head.softcap, scale=head.scale)
    # Weights without a gradient: autograd then makes no [V, D] beside [T, D].
    frozen.logits = partial(type(head).logits, frozen)  # the head's own formula, of the detached weights
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        out = objective.loss(LossView(frozen, lambda: leaf), batch, plan)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
    return gradient.double(), out.mixup
