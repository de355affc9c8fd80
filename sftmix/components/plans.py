"""Plans without pairs, which several objectives make."""

from dataclasses import replace
from typing import Literal

from sftmix.types import Batch, Plan, Tensor


def ntp_plan(batch: Batch, slot_weight: Tensor) -> Plan:
    """Return a plan of NTP alone: each response token has the weight of its slot, f32[B], times its own in the rows.

    The sum is divided by the sum of these weights.
    """
    import torch

    row_weight_T = slot_weight[batch.slot]  # [B] -> [T]
    if batch.weight is not None:
        row_weight_T = row_weight_T * batch.weight
    nothing = torch.empty(0, dtype=torch.float32)
    return Plan(
        row_weight=row_weight_T,
        pairs=batch.pairs[:0],
        pair_weight=nothing,
        lam=nothing,
        ntp_count=float(row_weight_T.sum(dtype=torch.float64)),  # float32 has no odd number beyond 16,777,216
        mixup_count=0.0,
    )


DividedBy = Literal["tokens", "weights", "response"]


def with_prompts(plan: Plan, batch: Batch, weight: float, *, divided_by: DividedBy = "tokens") -> Plan:
    """Return a plan in which each token of the prompts weighs `weight` as well; the objective needs Need.PROMPTS.

    divided_by  the NTP sum is divided by the number of all tokens, where those of responses count as before; by the sum
                of all weights; or by the response alone, as before
    """
    assert batch.prompt is not None, "without Need.PROMPTS a batch has no tokens of prompts"
    counted_Q = batch.ntp_weight[batch.prompt.slot]
    added = {"tokens": 1.0, "weights": weight, "response": 0.0}[divided_by] * float(counted_Q.sum())
    return replace(plan, prompt_weight=weight * counted_Q, ntp_count=plan.ntp_count + added)


def sequence_plan(batch: Batch, slot_weight: Tensor) -> Plan:
    """Return a plan of NTP on the mean NLL of each response, times `slot_weight` [B]; its count is their sum.

    A response whose tokens have weights in the rows weighs their mean.
    """
    import torch

    size_B = batch.n_tokens
    weight_B = torch.where(size_B > 0, slot_weight.double(), 0.0)
    plan = ntp_plan(batch, weight_B / size_B.clamp(min=1))
    # The sum over tokens of 1 / N_i is the same number, but rounded.
    return plan if batch.weight is not None else replace(plan, ntp_count=float(weight_B.sum()))
