"""R-Drop (arXiv 2106.14448): two passes must agree; `--objective r_drop.RDrop`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sftmix.components import NTP, LossView
from sftmix.components.others.places import aligned
from sftmix.functional import SFTLoss
from sftmix.ranks.rng import generator
from sftmix.types import Batch, Plan, Tensor


@dataclass(frozen=True, kw_only=True)
class Dropped(Plan):
    """A plan with bool[tokens of all examples], False for what the second pass does not see."""

    kept: Tensor


class RDrop(NTP):
    """The mean NLL of two passes, and `weight` times the mean of the KL divergences between them; left out: dropout of
    units. The second pass drops input tokens instead, so that models without dropout have two passes as well."""

    passes = 2

    def __init__(self, *, weight: float = 1.0, share: float = 0.1):
        """
        weight: of the divergence.
        share: of the input tokens that are dropped.
        """
        self.weight, self.share = weight, share

    def plan(self, batch: Batch, *, step: int, seed: int, **at: Any) -> Plan:
        plan, examples = super().plan(batch), zip(batch.ids, batch.examples, strict=True)
        drawn = [generator(seed, "r_drop", step, name).random(len(one.input_ids)) for name, one in examples]
        return Dropped(**vars(plan), kept=torch.from_numpy(np.concatenate(drawn)) >= self.share)

    def loss(self, view: LossView, batch: Batch, plan: Dropped) -> SFTLoss:
        ids, mask, column = aligned(batch)
        kept = mask.clone()
        kept[mask] = plan.kept
        again = view.states(ids, mask, change=lambda e: e * kept[:, :, None])[batch.slot, column]
        loss, _ = view.chunked_loss((view.hidden, again), self.both, batch.labels, row_weight=plan.row_weight)
        return view.sft_loss(batch, plan)._replace(loss=loss)

    def both(self, one: Tensor, two: Tensor, label: Tensor) -> Tensor:
        one, two = one.log_softmax(-1), two.log_softmax(-1)
        divergence = ((one.exp() - two.exp()) * (one - two)).sum(-1) / 2
        return self.weight * divergence - (one + two).gather(1, label[:, None])[:, 0] / 2
