"""Proximal SFT (arXiv 2508.17784): no token moves far from an old model; `--objective proximal_sft.ProximalSFT`."""

import torch.nn.functional as F

from sftmix.components import LossView, Objective
from sftmix.components.component import require
from sftmix.components.others.tokens import StoredReference
from sftmix.types import Batch, Tensor


class ProximalSFT(StoredReference):
    """The gradient of the clipped ratio r = p / p_old: each token's NLL times r, or 0 once r is above 1 + epsilon; left
    out: an old model that is renewed during the training, as p_old is that of the first checkpoint in the file."""

    def __init__(self, *, dynamics: str, epsilon: float = 0.28, mixup: Objective | None = None):
        """
        dynamics: a dynamics.parquet with the NLL of each token.
        epsilon: how far a probability may grow, as a share of the old one, above 0.
        mixup: the objective whose NTP is weighed; null: NTP, without pairs.
        """
        super().__init__(dynamics=dynamics, mixup=mixup)
        require(epsilon > 0, "objective.epsilon", epsilon, "a number above 0")
        self.epsilon = epsilon

    def factors(self, view: LossView, batch: Batch) -> Tensor:
        nll = view.figures(lambda logits, label: F.cross_entropy(logits, label, reduction="none"), batch.labels)
        ratio = (self.reference_nll(batch) - nll).exp()
        return ratio * (ratio <= 1 + self.epsilon)
