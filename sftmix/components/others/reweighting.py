"""Baselines that weigh the NTP loss by token or by example. They do not mix: pairs only decide the order."""

import math
from typing import Any

from sftmix.components.base import Objective
from sftmix.components.component import Need, require
from sftmix.components.objectives import NTP
from sftmix.components.plans import sequence_plan
from sftmix.components.view import LossView, SFTLoss
from sftmix.types import Batch, Plan


class LabelSmoothing(NTP):
    """NTP whose targets are (1 - epsilon) one-hot + epsilon uniform over the vocabulary."""

    def __init__(self, *, epsilon: float = 0.1):
        """epsilon: mass of the uniform distribution, from 0 (NTP) to below 1."""
        require(0 <= epsilon < 1, "objective.epsilon", epsilon, "from 0 to below 1")
        self.epsilon = epsilon

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        return view.sft_loss(batch, plan, label_smoothing=self.epsilon)


class DFT(NTP):
    """Dynamic fine-tuning (arXiv 2508.05629): each token's NLL times its own probability, detached.

    The sum is divided by the number of response tokens. Its authors read it as a policy gradient whose implicit reward
    no longer grows as 1 / p.
    """

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        return view.sft_loss(batch, plan, rule=lambda nll, entropy: (-nll).exp())  # p of the label


class IRDRO(Objective):
    """Instance-reweighted, distributionally robust optimisation (arXiv 2402.14270): a higher loss weighs more.

    loss_i is the mean NLL of response i, w = softmax(loss / tau) over the whole global batch, detached, and
    L = sum_i w_i loss_i. Each step costs one more forward pass, which gives the losses that set the weights.
    """

    needs = frozenset({Need.BATCH_NLL})

    def __init__(self, *, tau: float = 1.0):
        """tau: temperature, above 0; a smaller one moves more weight to the hardest examples."""
        require(0 < tau < math.inf, "objective.tau", tau, "a number above 0 (its authors: 1)")
        self.tau = tau

    def plan(self, batch: Batch, **at: Any) -> Plan:
        import torch

        of_batch = batch.batch_nll
        assert of_batch is not None
        if not len(of_batch.rows):  # nothing but repeats, which are trained no second time
            return sequence_plan(batch, batch.ntp_weight * 0)
        weight_G = torch.softmax(of_batch.nll_sum.double() / of_batch.n_tokens / self.tau, dim=0)
        # rows [3, 7, 9], batch [7, 3]: places 1 and 0; a filler's row may be missing, and has ntp_weight 0
        place = torch.searchsorted(of_batch.rows, batch.rows).clamp(max=len(weight_G) - 1)
        return sequence_plan(batch, torch.where(batch.ntp_weight > 0, weight_G[place], 0.0))
