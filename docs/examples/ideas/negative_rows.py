"""Forgetting (arXiv 2508.04329): the least confident rows are unlearned; `--objective negative_rows.NegativeRows`."""

from dataclasses import replace

from sftmix.components import NTP, Need
from sftmix.components.component import require
from sftmix.components.plans import ntp_plan
from sftmix.types import Batch, Plan


class NegativeRows(NTP):
    """The rows of the split's last group have a negative weight, which grows from 0 to `weight` over the training; left
    out: negative tokens, which the paper finds in any row by a reference."""

    needs = frozenset({Need.PAIRS, Need.FIRST_SPLIT})  # the groups are in a batch if the run pairs

    def __init__(self, *, weight: float = 0.05):
        """weight: of a negative row at the end, from 0 (such rows are left out) to 1."""
        require(0 <= weight <= 1, "objective.weight", weight, "from 0 to 1")
        self.weight = weight

    def plan(self, batch: Batch, *, step: int, total_steps: int, seed: int) -> Plan:
        negative = batch.group == batch.n_groups - 1
        trained = ntp_plan(batch, batch.ntp_weight * ~negative)
        unlearned = ntp_plan(batch, batch.ntp_weight * negative)
        weight = self.weight * (step + 1) / total_steps
        row_weight = trained.row_weight - weight * unlearned.row_weight
        return replace(trained, row_weight=row_weight, ntp_count=trained.ntp_count + unlearned.ntp_count)
