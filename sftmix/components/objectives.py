"""Objectives of the paper: the weights and lambdas of one optimizer step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from sftmix.components.base import Objective, Schedule
from sftmix.components.component import Need, require, require_one_of
from sftmix.components.plans import ntp_plan, sequence_plan
from sftmix.components.view import LossView, SFTLoss
from sftmix.ranks.rng import generator
from sftmix.types import Batch, Float64, Plan
from sftmix.words.errors import ConfigError

NtpOn = Literal["all", "confident", "unconfident"]
MixupMean = Literal["own", "ntp"]
LambdaPer = Literal["pair", "batch", "token"]
Mean = Literal["token", "sequence"]


class NTP(Objective):
    """Next-token prediction on every example, each response token alike: the baseline."""

    def plan(self, batch: Batch, **at: Any) -> Plan:
        return ntp_plan(batch, batch.ntp_weight)


def drawn(alpha: float, number: int, pair: Sequence[str], *, step: int, seed: int) -> Float64:
    """Return lambdas f64[number] ~ Beta(alpha, alpha) of a pair of ids in a step; without ids, of all its pairs."""
    return generator(seed, "lambda", step, *pair).beta(alpha, alpha, number)


class SFTMix(Objective):
    """The paper's objective: NTP plus mu times the Mixup between confident and unconfident examples.

    For a pair (c, u) with lambda ~ Beta(alpha, alpha), the head's inputs and the one-hot labels of their n-th response
    tokens are mixed, n = 1..min(N_c, N_u), and the cross entropy between the mixtures is minimised. With mu = 0, the
    plan is NTP's, bit for bit (with `mean: sequence`, the plan of NTP over sequences, the baseline for this mean).
    """

    needs = frozenset({Need.PAIRS})

    def __init__(
        self,
        *,
        mu: float | Schedule = 0.2,
        alpha: float | Schedule = 0.5,
        ntp_on: NtpOn = "all",
        mixup_mean: MixupMean = "own",
        lambda_per: LambdaPer = "pair",
        mean: Mean = "token",
    ):
        """
        mu: weight of the Mixup term, 0 or above; or a Schedule.
        alpha: parameter of Beta(alpha, alpha), above 0; small values keep lambda near 0 or 1. Or a Schedule.
        ntp_on: the examples that carry the NTP loss; `confident` and `unconfident` also leave out the unpaired ones.
        mixup_mean: the Mixup sum is divided by the number of mixed token pairs (own) or of NTP tokens (ntp).
        lambda_per: a lambda is drawn for each pair of examples, for the whole global batch, or for each token pair.
        mean: average over tokens, or over sequences: then the tokens of each response (Mixup: pair) are averaged first,
            and mixup_mean counts pairs and responses.
        """
        for key, value in (("mu", mu), ("alpha", alpha)):
            if not isinstance(value, Schedule):
                _value_at(key, value)
        require_one_of("objective.ntp_on", ntp_on, NtpOn)
        require_one_of("objective.mixup_mean", mixup_mean, MixupMean)
        require_one_of("objective.lambda_per", lambda_per, LambdaPer)
        require_one_of("objective.mean", mean, Mean)
        self.mu, self.alpha = mu, alpha
        self.ntp_on = ntp_on
        self.mixup_mean = mixup_mean
        self.lambda_per = lambda_per
        self.mean = mean
        if ntp_on != "all":
            self.needs = self.needs | {Need.FIRST_SPLIT}

    def check(self, sizes: Mapping[str, int], *, total_steps: int, **of_run: Any) -> None:
        for step in range(total_steps):
            if _value_at("mu", self.mu, step, total_steps) > 0:  # at 0 nothing is mixed, and alpha has no use
                _value_at("alpha", self.alpha, step, total_steps)

    def plan(self, batch: Batch, *, step: int, total_steps: int, seed: int) -> Plan:
        import torch

        mu, ntp = _value_at("mu", self.mu, step, total_steps), self._ntp(batch)
        if mu == 0:
            return ntp
        # Lambda of column 0 of each aligned token pair: the same on any rank and in any micro-batch.
        alpha = _value_at("alpha", self.alpha, step, total_steps)
        size_P = batch.pair_index.bincount(minlength=len(batch.slot_pairs))
        draws = [np.empty(0)]
        for (first, second), size in zip(batch.slot_pairs.tolist(), size_P.tolist(), strict=True):
            pair = () if self.lambda_per == "batch" else (batch.ids[first], batch.ids[second])
            lambdas = drawn(alpha, size if self.lambda_per == "token" else 1, pair, step=step, seed=seed)
            draws.append(np.broadcast_to(lambdas, (size,)))  # [1] or [size] -> [size]
        lam = torch.as_tensor(np.concatenate(draws), dtype=torch.float32)

        # The weight of each token pair before mu, and their part of the Mixup denominator.
        share_M, mixup_count = lam.new_ones(len(lam)), float(len(lam))
        if self.mean == "sequence":
            share_M, mixup_count = 1 / size_P.double()[batch.pair_index], float((size_P > 0).sum())
        if batch.weight is not None:  # weights of the rows are interpolated as the labels are
            weight_M2, lam_M = batch.weight[batch.pairs], lam.double()  # lambda w_i + (1 - lambda) w_j
            share_M = share_M * (lam_M * weight_M2[:, 0] + (1 - lam_M) * weight_M2[:, 1])
            mixup_count = float(share_M.sum())
        return replace(
            ntp,
            pairs=batch.pairs,
            pair_weight=mu * share_M,
            lam=lam,
            mixup_count=mixup_count,
            mu=mu,
            mixup_mean=self.mixup_mean,
        )

    def _ntp(self, batch: Batch) -> Plan:
        """Return the NTP plan of the slots whose group carries NTP, averaged over tokens or sequences."""
        weight = batch.ntp_weight
        if self.ntp_on != "all":
            if batch.n_groups == 0:
                raise ConfigError(f"objective.ntp_on is {self.ntp_on}, which needs a split; set it to all")
            weight = weight * (batch.group == (0 if self.ntp_on == "confident" else batch.n_groups - 1))
        return ntp_plan(batch, weight) if self.mean == "token" else sequence_plan(batch, weight)


class MixupOnly(SFTMix):
    """Mixup without NTP (section 5.3): SFTMix's Mixup term alone, with weight 1, divided by its own count."""

    needs = frozenset({Need.PAIRS, Need.FIRST_SPLIT})

    def __init__(self, *, alpha: float | Schedule = 0.5, lambda_per: LambdaPer = "pair", mean: Mean = "token"):
        """
        alpha: parameter of Beta(alpha, alpha), above 0; small values keep lambda near 0 or 1. Or a Schedule.
        lambda_per: a lambda is drawn for each pair of examples, for the whole global batch, or for each token pair.
        mean: average over token pairs, or over pairs of sequences: then the tokens of each pair are averaged first.
        """
        super().__init__(mu=1.0, alpha=alpha, lambda_per=lambda_per, mean=mean)

    def _ntp(self, batch: Batch) -> Plan:
        return ntp_plan(batch, batch.ntp_weight * 0)


class DecomposedMixup(SFTMix):
    """Control: lambda CE_c + (1 - lambda) CE_u instead of the Mixup loss; neither inputs nor labels are mixed.

    Pairs, positions, lambdas, weights and counts are SFTMix's: the two differ in the mixing alone (appendix A:
    Mixup has another gradient, because softmax is not linear).
    """

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        (i, j), lam_M, weight_M = plan.pairs.unbind(1), plan.lam.double(), plan.pair_weight.double()
        # w_m (lambda CE_i + (1 - lambda) CE_j) is NTP with more weight on rows i and j
        weight_T = plan.row_weight.double()  # a row may be in several pairs; CUDA's index_add has no order
        weight_T = weight_T.index_put((i,), weight_M * lam_M, accumulate=True)
        weight_T = weight_T.index_put((j,), weight_M * (1 - lam_M), accumulate=True)
        out = view.sft_loss(batch, plan.without_pairs(weight_T))
        return out._replace(mixup=plan.lam * out.nll[i] + (1 - plan.lam) * out.nll[j])


def _value_at(key: str, value: float | Schedule, step: int = 0, total_steps: int = 0) -> float:
    """Return mu or alpha, a schedule's value at this step; ConfigError out of its range."""
    name = f"objective.{key}"
    if isinstance(value, Schedule):
        name, value = f"{name} at step {step} of {total_steps}", float(value.value(step, total_steps))
    holds = 0 <= value < math.inf and (value > 0 or key == "mu")
    require(holds, name, value, "a number from 0 (paper: 0.2)" if key == "mu" else "a number above 0 (paper: 0.5)")
    return value
