"""ssToken (arXiv 2510.18250): only the tokens that were learned most are trained; `--objective ss_token.SSToken`."""

import math

import torch
import torch.nn.functional as F

from sftmix.components import LossView
from sftmix.components.others.tokens import Rho1
from sftmix.types import Batch, Tensor


class SSToken(Rho1):
    """In each response, the share of the tokens whose NLL has fallen most since the first checkpoint in the file; left
    out: the second half of the score, by attention, and a past model that follows the training."""

    def factors(self, view: LossView, batch: Batch) -> Tensor:
        nll = view.figures(lambda logits, label: F.cross_entropy(logits, label, reduction="none"), batch.labels)
        fallen = (self.reference_nll(batch) - nll).round(decimals=3)  # the file is rounded
        return torch.cat([self.chosen(fallen[batch.slot == slot]) for slot in range(len(batch.ids))])

    def chosen(self, fallen: Tensor) -> Tensor:
        kept = math.ceil(self.share * len(fallen) - 1e-9)
        rank = fallen.argsort(descending=True, stable=True).argsort()
        return (rank < kept).to(fallen) * (len(fallen) / max(kept, 1))  # the plan counts the share alone
