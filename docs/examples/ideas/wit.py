"""Weighted instruction tuning (arXiv 2507.07817): prompts are trained as well; `--objective wit.WIT`."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from sftmix.components import NTP, LossView
from sftmix.components.component import require
from sftmix.components.others.places import aligned
from sftmix.functional import SFTLoss
from sftmix.types import Batch, Plan, Tensor


class WIT(NTP):
    """Tokens of prompts have a weight as well, and the sum is divided by the number of all tokens; left out: weights of
    the response other than 1. It costs one more pass."""

    def __init__(self, *, prompt: float = 0.2):
        """prompt: weight of a prompt's token, above 0."""
        require(prompt > 0, "objective.prompt", prompt, "a number above 0")
        self.prompt = prompt

    def plan(self, batch: Batch, **at: Any) -> Plan:
        plan = super().plan(batch, **at)
        return replace(plan, ntp_count=plan.ntp_count + float(lines(batch)[2].sum()))

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        response, (ids, mask, asked) = view.sft_loss(batch, plan), lines(batch)
        row, place = asked.nonzero(as_tuple=True)
        undivided = batch.ntp_weight[batch.slot] * (1 if batch.weight is None else batch.weight)
        weight = self.prompt * asked[row, place] * plan.row_weight.sum() / undivided.sum().clamp(min=1e-9)
        states = view.states(ids, mask)[row, place]
        asked_loss, _ = view.chunked_loss(states, nll, ids[row, place + 1], row_weight=weight)
        return response._replace(loss=response.loss + asked_loss)


def nll(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, reduction="none")


def lines(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids i64[B, L], mask bool[B, L], and f32[B, L - 1], 1 where the next token is a prompt's."""
    ids, mask, column = aligned(batch)
    asked = (mask[:, 1:] & mask[:, :-1]) * batch.ntp_weight[:, None]
    asked[batch.slot, column] = 0
    return ids, mask, asked
