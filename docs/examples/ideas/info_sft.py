"""InfoSFT (arXiv 2605.14967): tokens of middling probability weigh most; `--objective info_sft.InfoSFT`."""

from sftmix.components import NTP, LossView
from sftmix.components.component import require
from sftmix.functional import SFTLoss
from sftmix.types import Batch, Plan, Tensor


class InfoSFT(NTP):
    """Each token's NLL is multiplied by q (1 - logit(q) / C), at least 0, where q is the model's own probability of the
    token; left out: nothing of the loss. The authors' code calls the probability at which it ends P: C = logit P."""

    def __init__(self, *, c: float = 2.587):
        """c: above 0; a token whose logit of q is c or higher is not trained (2.587: P = 0.93, as the authors')."""
        require(c > 0, "objective.c", c, "a number above 0")
        self.c = c

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        return view.sft_loss(batch, plan, rule=self.factor)

    def factor(self, nll: Tensor, entropy: Tensor) -> Tensor:
        q = (-nll).exp()
        return (q * (1 - q.logit(eps=1e-7) / self.c)).clamp(min=0)
