"""Baselines that add a penalty on the prediction to the NTP loss. They do not mix: pairs only decide the order."""

import math

from sftmix.components.component import require
from sftmix.components.objectives import NTP
from sftmix.components.view import LossView, SFTLoss
from sftmix.types import Batch, Plan


class ConfidencePenalty(NTP):
    """NTP minus beta times the entropy of each prediction (Pereyra et al. 2017, arXiv 1701.06548).

    The entropy is over the vocabulary, in nats, and weighs as its token does in NTP. Each step costs one more pass of
    the head.
    """

    def __init__(self, *, beta: float = 0.1):
        """beta: weight of the entropy, from 0 (NTP)."""
        require(0 <= beta < math.inf, "objective.beta", beta, "a number from 0")
        self.beta = beta

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        def negative_entropy(z):
            logp = z.log_softmax(-1)
            return (logp.exp() * logp).sum(-1)

        ntp = view.sft_loss(batch, plan)
        penalty = view.chunked_loss(view.hidden, negative_entropy, row_weight=self.beta * plan.row_weight)
        return ntp._replace(loss=ntp.loss + penalty.loss)
