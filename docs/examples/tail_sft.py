"""An objective that leaves out the examples which have been learned most.

Copy it to where `sftmix` is started: `--objective tail_sft.TailSFT
--objective.dynamics runs/reference/confidence/dynamics.parquet`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from sftmix.components import LossView, Need, Objective
from sftmix.components.component import require
from sftmix.components.others.tokens import StoredReference
from sftmix.disk.places import place_of
from sftmix.disk.tables import read_dynamics
from sftmix.types import Batch, Plan, Tensor


class TailSFT(StoredReference):
    """TailSFT: of each global batch, the examples whose mean NLL has fallen most since the reference are left out.

    As in the example of TRL (huggingface/trl #7212), round(share G) of the G examples are left out, at least one stays,
    and the NTP sum is divided by the tokens that stay. Each step costs one more forward pass.
    """

    needs = frozenset({Need.BATCH_NLL})

    def __init__(self, *, dynamics: str, share: float = 0.5, mixup: Objective | None = None):
        """
        dynamics: a dynamics.parquet; the NLL of each response is enough.
        share: share of the examples that are left out, from 0 (NTP) to below 1.
        mixup: the objective whose NTP is weighed, such as SFTMix with its options; null: NTP, without pairs.
        """
        super().__init__(dynamics=dynamics, mixup=mixup)
        require(0 <= share < 1, "objective.share", share, "from 0 to below 1")
        self.share = share

    def plan(self, batch: Batch, **at: Any) -> Plan:
        import torch

        nll = batch.batch_nll
        assert nll is not None
        before = torch.tensor([self.stored[name][0, 0] for name in nll.ids], dtype=torch.float64)
        # Rounded, as before the first step all have fallen by nothing but the rounding of a forward.
        fallen = (before - nll.nll_sum / nll.n_tokens).round(decimals=4).tolist()
        order = sorted(range(len(fallen)), key=lambda k: (-fallen[k], nll.ids[k]))
        left_out = nll.rows[order[: round(self.share * len(fallen))]]
        batch = replace(batch, ntp_weight=batch.ntp_weight * ~torch.isin(batch.rows, left_out[: len(fallen) - 1]))
        return super().plan(batch, **at)

    @cached_property
    def stored(self) -> Mapping[str, Any]:
        """The mean NLL of each example in the place of its tokens', [C, n]: the file may hold no single ones."""
        dynamics = read_dynamics(place_of(self.dynamics))
        rows = zip(dynamics.ids, dynamics.mean_nll, dynamics.n_tokens.tolist(), strict=True)
        return {name: np.repeat(mean[:, None], size, axis=1) for name, mean, size in rows}

    def factors(self, view: LossView, batch: Batch) -> Tensor:
        return view.hidden.new_ones(len(batch.labels))
