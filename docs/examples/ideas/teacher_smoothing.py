"""Label smoothing from a teacher (arXiv 1909.11723); `--objective teacher_smoothing.TeacherSmoothing`."""

from functools import cached_property

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftmix.components import NTP, LossView
from sftmix.components.others.places import aligned
from sftmix.functional import SFTLoss
from sftmix.types import Batch, Plan, Tensor


class TeacherSmoothing(NTP):
    """A share of each label is spread over the tokens that a frozen model holds likeliest; left out: the tail of its
    predictions, a temperature, and ranks that share it. The teacher has the target's tokens."""

    def __init__(self, *, teacher: str, epsilon: float = 0.1, top: int = 20):
        """
        teacher: name or directory of a model.
        epsilon: the share of a label that is spread.
        top: number of likeliest tokens.
        """
        self.teacher, self.epsilon, self.top = teacher, epsilon, top

    @cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.teacher).eval().requires_grad_(False)

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        ids, mask, column = aligned(batch)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": mask.cumsum(1).sub(1).clamp(min=0)}
        with torch.no_grad():
            logits = self.model.to(ids.device)(**inputs).logits[batch.slot, column]
        likeliest, words = logits.topk(self.top)
        columns = words, likeliest.softmax(-1)
        soft, _ = view.chunked_loss(view.hidden, spread, *columns, row_weight=plan.row_weight)
        hard = view.sft_loss(batch, plan)
        return hard._replace(loss=(1 - self.epsilon) * hard.loss + self.epsilon * soft)


def spread(logits: Tensor, words: Tensor, share: Tensor) -> Tensor:
    return -(share * logits.log_softmax(-1).gather(1, words)).sum(-1)
