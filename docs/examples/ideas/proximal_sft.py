"""Proximal SFT (arXiv 2508.17784): no token moves far from an old model; `--objective proximal_sft.ProximalSFT`."""

import torch.nn.functional as F

from sftmix.components import LossView, Need, Objective, TokenWeights
from sftmix.components.component import require
from sftmix.types import Batch, Tensor


class ProximalSFT(TokenWeights):
    """The gradient of the clipped ratio r = p / p_old: each token's NLL times r, or 0 once r is above 1 + epsilon; left
    out: an old model that is renewed during the training, as p_old is the model before it."""

    needs = frozenset({Need.TEACHER})

    def __init__(self, *, epsilon: float = 0.28, mixup: Objective | None = None):
        """
        epsilon: how far a probability may grow, as a share of the old one, above 0.
        mixup: the objective whose NTP is weighed; null: NTP, without pairs.
        """
        super().__init__(mixup=mixup)
        require(epsilon > 0, "objective.epsilon", epsilon, "a number above 0")
        self.epsilon = epsilon

    def factors(self, view: LossView, batch: Batch) -> Tensor:
        old, new = (it.figures(nll, batch.labels) for it in (view.teacher, view))
        ratio = (old - new).exp()
        return ratio * (ratio <= 1 + self.epsilon)


def nll(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, reduction="none")
