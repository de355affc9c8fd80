"""Baselines that weigh the NTP loss by token or by example. They do not mix: pairs only decide the order."""

from __future__ import annotations

from sftmix.common.errors import ConfigError
from sftmix.components.base import Need, Objective, check_number
from sftmix.components.objectives import NTP, sequence_plan
from sftmix.components.view import LossView, SFTLoss
from sftmix.types import Batch, Plan


class LabelSmoothing(NTP):
    """NTP whose targets are (1 - epsilon) one-hot + epsilon uniform over the vocabulary."""

    def __init__(self, *, epsilon: float = 0.1) -> None:
        """epsilon: mass of the uniform distribution, from 0 (NTP) to below 1."""
        if not 0 <= epsilon < 1:
            raise ConfigError(f"objective.epsilon is {epsilon}; allowed: from 0 to below 1")
        self.epsilon = epsilon

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        return view.sft_loss(batch, plan, label_smoothing=self.epsilon)


class DFT(NTP):
    """Dynamic fine-tuning (arXiv 2508.05629): each token's NLL times its own probability, detached.

    The sum is divided by the number of response tokens. Its authors read it as a policy gradient whose implicit reward
    no longer grows as 1 / p.
    """

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        return view.sft_loss(batch, plan, rule=lambda nll, entropy: (-nll).exp())


class IRDRO(Objective):
    """Instance-reweighted, distributionally robust optimisation (arXiv 2402.14270): a higher loss weighs more.

    loss_i is the mean NLL of response i, w = softmax(loss / tau) over the whole global batch, detached, and
    L = sum_i w_i loss_i. Each step costs one more forward pass, which gives the losses that set the weights.
    """

    needs = frozenset({Need.BATCH_NLL})

    def __init__(self, *, tau: float = 1.0) -> None:
        """tau: temperature, above 0; a smaller one moves more weight to the hardest examples."""
        check_number("objective.tau", tau, above=0, hint="a number above 0 (its authors: 1)")
        self.tau = tau

    def plan(self, batch: Batch, *, step: int, total_steps: int, seed: int) -> Plan:
        import torch

        batch_nll = batch.batch_nll
        if batch_nll is None:
            raise ConfigError("objective IRDRO needs the losses of the whole global batch, and batch.batch_nll is None")
        if not len(batch_nll.rows):  # nothing but repeats, which are trained no second time
            return sequence_plan(batch, batch.ntp_weight * 0)
        weight_G = torch.softmax(batch_nll.nll_sum.double() / batch_nll.n_tokens / self.tau, dim=0)
        trained = batch.ntp_weight > 0
        place = torch.searchsorted(batch_nll.rows, batch.rows).clamp(max=len(batch_nll.rows) - 1)
        if not torch.equal(batch_nll.rows[place][trained], batch.rows[trained]):
            raise ConfigError("objective IRDRO: batch.batch_nll does not hold all examples of this batch")
        return sequence_plan(batch, torch.where(trained, weight_G[place], 0.0))
