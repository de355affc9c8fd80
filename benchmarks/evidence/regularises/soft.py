"""A control of preregistration-regularises.md: mixed labels without mixed inputs."""

import torch.nn.functional as F

from sftmix.components import LossView, SFTMix
from sftmix.functional import SFTLoss
from sftmix.types import Batch, Plan, Tensor


class SoftLabels(SFTMix):
    """SFTMix whose labels are mixed and whose inputs are not; pairs, lambdas, weights and counts are SFTMix's.

    Instead of CE(lambda Z_c + (1 - lambda) Z_u, Y~), each pair of positions adds
    lambda CE(Z_c, Y~) + (1 - lambda) CE(Z_u, Y~), with the same Y~ = lambda Y_c + (1 - lambda) Y_u.
    """

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        (i, j), ntp = plan.pairs.unbind(1), view.sft_loss(batch, plan.without_pairs())
        columns = batch.labels[i], batch.labels[j], plan.lam
        loss, each = view.chunked_loss((view.hidden[i], view.hidden[j]), soft, *columns, row_weight=plan.pair_weight)
        return ntp._replace(loss=ntp.loss + loss, mixup=each)


def soft(z_c: Tensor, z_u: Tensor, y_c: Tensor, y_u: Tensor, lam: Tensor) -> Tensor:
    """Return the loss [r] of pairs with the logits z [r, V], labels y [r] and lambda [r]."""
    of_c, of_u = (
        lam * F.cross_entropy(z, y_c, reduction="none") + (1 - lam) * F.cross_entropy(z, y_u, reduction="none")
        for z in (z_c, z_u)
    )
    return lam * of_c + (1 - lam) * of_u
