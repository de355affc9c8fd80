from dataclasses import replace

import torch

from sftmix.components import Schedule, SFTMix
from sftmix.types import Batch, Plan


class FadingMixup(SFTMix):
    """SFTMix whose Mixup fades along the response: the n-th token pair weighs decay ** n."""

    def __init__(self, *, mu: float | Schedule = 0.2, decay: float = 0.95):
        """
        mu: weight of the Mixup term, 0 or above; or a Schedule.
        decay: how much each further token weighs of the one before, in (0, 1].
        """
        super().__init__(mu=mu)
        self.decay = decay

    def plan(self, batch: Batch, *, step: int, total_steps: int, seed: int) -> Plan:
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        if plan.mu == 0:
            return plan
        place = torch.arange(len(batch.pair_index), device=batch.pair_index.device)
        first = torch.searchsorted(batch.pair_index, batch.pair_index)  # where each pair's tokens begin
        weight = self.decay ** (place - first).double()
        return replace(plan, pair_weight=plan.mu * weight, mixup_count=float(weight.sum()))
