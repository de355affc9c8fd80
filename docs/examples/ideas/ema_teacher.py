"""A mean teacher (arXiv 1703.01780): an average of the trained weights; `--objective ema_teacher.EMATeacher`."""

from sftmix.components import NTP, LossView, Need
from sftmix.components.component import require
from sftmix.functional import SFTLoss
from sftmix.types import Batch, Plan, Tensor


class EMATeacher(NTP):
    """NTP plus `weight` times KL(teacher || model), whose teacher is a moving average of the trained weights; left out:
    the squared error of probabilities, for which KL stands, noise of the inputs, and the ramps of weight and decay."""

    needs = frozenset({Need.TEACHER})
    gives = frozenset()

    def __init__(self, *, weight: float = 0.5, decay: float = 0.99):
        """
        weight: of the divergence, from 0.
        decay: of the average, from 0 to below 1.
        """
        require(0 <= decay < 1, "objective.decay", decay, "from 0 to below 1")
        self.weight, self.decay = weight, decay
        self.teacher_decay = decay

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        def divergence(logits: Tensor, states: Tensor) -> Tensor:
            expected = view.teacher.logits(states).log_softmax(-1)
            return (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)

        loss, _ = view.chunked_loss(view.hidden, divergence, view.teacher.hidden, row_weight=plan.row_weight)
        ntp = view.sft_loss(batch, plan)
        return ntp._replace(loss=ntp.loss + self.weight * loss)
