"""Mixup at other places than the input of the LM head, and controls that mix inputs alone or labels alone.

Mixup of embeddings, layers or tokens costs a second pass of the backbone, over the pairs alone. There each example of
a pair has a line (a row of input ids), padded on the left so that both first responses begin in one column. In its own
line an example has the share lambda, its partner 1 - lambda, wherever both have a token, also in the prompts; the loss
of a token pair is the mean of both lines. NTP, pairs, lambdas and weights are SFTMix's. In conversations with several
trained turns, later responses may be in different columns, since the first ones differ in length: such token pairs are
left out and not counted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from sftmix.components.base import Schedule
from sftmix.components.component import Need, require, require_one_of
from sftmix.components.objectives import SFTMix
from sftmix.components.view import LossView, SFTLoss
from sftmix.ranks.rng import generator
from sftmix.ranks.transfer import send
from sftmix.types import Batch, Plan, Tensor
from sftmix.words.errors import ConfigError
from sftmix.words.given import as_list

OF_ONE = "Mixup of embeddings or layers needs examples of one document; set data.packing false"


@dataclass(frozen=True, kw_only=True)
class LinesPlan(Plan):
    """A plan with the lines [R, L] of P pairs, R = 2 P: all first examples, then all second ones. R = 2 without pairs.

    input_ids  i64[R, L]
    mask       bool[R, L], the real tokens
    share      f32[R], lambda of the line's own example
    line, column  i64[2 M], the line of each token row, and the column whose state predicts its token; the token rows
               `pairs[:, 0]` come before `pairs[:, 1]`
    own, other  i64[2 M], the labels of these token rows and of their partners
    layer      the decoder layer after which states are mixed; 0: the embeddings
    """

    input_ids: Tensor
    mask: Tensor
    share: Tensor
    line: Tensor
    column: Tensor
    own: Tensor
    other: Tensor
    layer: int


def aligned(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return input_ids i64[B, L] and mask bool[B, L], padded so that all first responses begin in one column.

    Return also column i64[T], the one whose state predicts the token of each token row. All are on the device of the
    batch. Raises ConfigError for examples of several documents, which a line cannot keep apart.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    if any(example.starts is not None and len(example.starts) > 1 for example in batch.examples):
        raise ConfigError(OF_ONE)
    begins = [int(example.target[1:].argmax()) for example in batch.examples]  # the token before each first response
    ids, column = [], []
    for example, begin in zip(batch.examples, begins, strict=True):
        padding = max(begins) - begin
        # -1 is no token: it marks padding until the mask is made
        ids.append(torch.from_numpy(np.pad(example.input_ids, (padding, 0), constant_values=-1)))
        column.append(padding + np.flatnonzero(example.target[1:]))
    padded = pad_sequence(ids, batch_first=True, padding_value=-1)
    columns, device = torch.from_numpy(np.concatenate(column)), batch.labels.device
    return send(padded.clamp(min=0), device), send(padded >= 0, device), send(columns, device)


def mixed_cross_entropy(logits: Tensor, own: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    """Return lambda CE(own) + (1 - lambda) CE(other) [r] of logits [r, V], labels i64[r] and lambda [r]."""
    import torch.nn.functional as F

    own_loss, other_loss = (F.cross_entropy(logits, labels, reduction="none") for labels in (own, other))
    return lam * own_loss + (1 - lam) * other_loss


class ManifoldMixup(SFTMix):
    """Mixup of the states after a decoder layer (arXiv 1806.05236), with the labels mixed as in SFTMix."""

    gives = frozenset()
    passes = 2

    def __init__(self, *, mu: float | Schedule = 0.2, alpha: float | Schedule = 0.5, layers: int | list[int] = 0):
        """
        mu: weight of the Mixup term, 0 or above; or a Schedule.
        alpha: parameter of Beta(alpha, alpha), above 0; small values keep lambda near 0 or 1. Or a Schedule.
        layers: a decoder layer, from 1, or a list of them, from which each step draws one; 0 is the embeddings.
        """
        super().__init__(mu=mu, alpha=alpha)
        self.layers = as_list(layers)
        allowed = "a number from 0, or several, such as [0, 4, 8]"
        require(min(self.layers, default=-1) >= 0, "objective.layers", layers, allowed)
        if any(self.layers):
            self.needs = self.needs | {Need.STATES}

    def check(self, sizes: Mapping[str, int], **of_run: Any) -> None:
        super().check(sizes, **of_run)
        layers = of_run["layers"]
        require(max(self.layers) <= layers, "objective.layers", self.layers, f"from 0 to {layers}, the decoder's last")
        if of_run["packed"]:
            raise ConfigError(OF_ONE)

    def plan(self, batch: Batch, *, step: int, total_steps: int, seed: int) -> Plan:
        import torch

        ids, mask, column = aligned(batch)
        same_column = column[batch.pairs[:, 0]] == column[batch.pairs[:, 1]]
        batch = replace(batch, pairs=batch.pairs[same_column], pair_index=batch.pair_index[same_column])
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        if plan.mu == 0:
            return plan
        # Without pairs there is one pass all the same: under FSDP every rank must make the same number.
        slots = batch.slot_pairs if len(batch.slot_pairs) else batch.slot_pairs.new_zeros(1, 2)
        pair, lines, rows = batch.pair_index, slots.T.flatten(), batch.pairs.T.flatten()  # [M], [2 P], [2 M]
        return LinesPlan(
            **{field.name: getattr(plan, field.name) for field in fields(Plan)},
            input_ids=ids[lines],
            mask=mask[lines],
            # 1, unmixed, for a pair that has no token pair left
            share=plan.lam.new_ones(len(slots)).index_copy(0, pair, plan.lam).repeat(2),
            line=torch.cat([pair, pair + len(slots)]),
            column=column[rows],
            own=batch.labels[rows],
            other=batch.labels[rows.roll(len(pair))],  # both halves exchanged: each row's partner
            layer=int(generator(seed, "layer", step).choice(self.layers)),
        )

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        import torch

        ntp = view.sft_loss(batch, plan.without_pairs())
        if not isinstance(plan, LinesPlan):  # mu is 0
            return ntp
        mask, share, half = plan.mask, plan.share[:, None, None], len(plan.mask) // 2

        def mix(states):
            """Mix the states [R, L, D] of each line with its partner's where both have a token, also in the prompts."""
            lam = share.to(torch.promote_types(share.dtype, states.dtype))
            mixture = lam * states + (1 - lam) * states.roll(half, 0)  # line r with line r + P, modulo 2 P
            return mixture.to(states.dtype).where((mask & mask.roll(half, 0))[:, :, None], states)

        states = view.states(plan.input_ids, mask, layer=plan.layer, change=mix)
        hidden, columns = states[plan.line, plan.column], (plan.own, plan.other, plan.lam.repeat(2))  # [2 M, D]
        weight = plan.pair_weight.repeat(2) / 2
        loss, losses = view.chunked_loss(hidden, mixed_cross_entropy, *columns, row_weight=weight)
        return ntp._replace(loss=ntp.loss + loss, mixup=losses.view(2, -1).mean(0))


class EmbeddingMixup(ManifoldMixup):
    """Mixup of the input embeddings (arXiv 1905.08941), with the labels mixed as in SFTMix."""

    def __init__(self, *, mu: float | Schedule = 0.2, alpha: float | Schedule = 0.5):
        """
        mu: weight of the Mixup term, 0 or above; or a Schedule.
        alpha: parameter of Beta(alpha, alpha), above 0; small values keep lambda near 0 or 1. Or a Schedule.
        """
        super().__init__(mu=mu, alpha=alpha)


class CutMix(EmbeddingMixup):
    """Control: a stretch of the response is the partner's (after arXiv 1905.04899); nothing is interpolated.

    Of N aligned response tokens, a run of round((1 - lambda) N) is exchanged between both lines, and each column is
    trained by NTP on the token that is then there.
    """

    def plan(self, batch: Batch, *, step: int, total_steps: int, seed: int) -> Plan:
        import torch

        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        if not isinstance(plan, LinesPlan):
            return plan
        # the token pairs of each pair follow one another; each part is a view of them
        swapped = torch.zeros(len(plan.lam), dtype=torch.bool)
        parts = swapped.split(plan.line[: len(swapped)].bincount(minlength=len(batch.slot_pairs)).tolist())
        for (first, second), share, part in zip(batch.slot_pairs.tolist(), plan.share.tolist(), parts, strict=False):
            length = round((1 - share) * len(part))
            start = generator(seed, "cut", step, batch.ids[first], batch.ids[second]).integers(len(part) - length + 1)
            part[start : start + length] = True
        labels = torch.where(swapped.repeat(2), plan.other, plan.own)
        ids = plan.input_ids.index_put((plan.line, plan.column + 1), labels)  # a state predicts the next column
        # share 1 mixes no states, and equal labels make the mixed cross entropy NTP's
        return replace(plan, input_ids=ids, share=torch.ones_like(plan.share), own=labels, other=labels)


class SoftLabels(SFTMix):
    """Control: the labels of a pair are mixed as in SFTMix, and its hidden states are not.

    A token pair with Y~ = lambda Y_i + (1 - lambda) Y_j adds lambda CE(Z_i, Y~) + (1 - lambda) CE(Z_j, Y~) instead of
    CE(lambda Z_i + (1 - lambda) Z_j, Y~). Pairs, lambdas, weights and counts are SFTMix's. At the same mu it softens
    more: an overfitted SmolLM2-135M had the fitted temperature of SFTMix with mu 0.2 at a mu of 0.0455.
    """

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        def soft(z_i, z_j, y_i, y_j, lam):
            """Return the loss [r] of token pairs with the logits z [r, V], labels y [r] and lambda [r]."""
            of_i, of_j = (mixed_cross_entropy(z, y_i, y_j, lam) for z in (z_i, z_j))
            return lam * of_i + (1 - lam) * of_j

        ntp, (i, j) = view.sft_loss(batch, plan.without_pairs()), plan.pairs.unbind(1)
        hidden, columns = (view.hidden[i], view.hidden[j]), (batch.labels[i], batch.labels[j], plan.lam)
        loss, losses = view.chunked_loss(hidden, soft, *columns, row_weight=plan.pair_weight)
        return ntp._replace(loss=ntp.loss + loss, mixup=losses)


Divergence = Literal["js", "kl"]


class MixtureDivergence(SFTMix):
    """NTP plus mu times the divergence between the mixture of predictions and the prediction of the mixture.

    With q = lambda p_i + (1 - lambda) p_j and p~ = softmax of the mixed logits: KL(q || p~), or the Jensen-Shannon
    divergence of both, as in AugMix (arXiv 1912.02781). Labels are not mixed.
    """

    def __init__(self, *, mu: float | Schedule = 0.2, alpha: float | Schedule = 0.5, divergence: Divergence = "js"):
        """
        mu: weight of the divergence (0: NTP alone), or a Schedule.
        alpha: parameter of Beta(alpha, alpha), above 0; small values keep lambda near 0 or 1. Or a Schedule.
        divergence: js (symmetric, at most log 2) or kl.
        """
        super().__init__(mu=mu, alpha=alpha)
        require_one_of("objective.divergence", divergence, Divergence)
        self.divergence = divergence

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        def divergence(z_i, z_j, z, lam):
            """Return the divergence of each pair from the logits [r, V] of both rows and of their mixture."""
            # In logs: a probability may underflow.
            log_i, log_j, log_p = (logits.log_softmax(-1) for logits in (z_i, z_j, z))
            log_q = (log_i + lam[:, None].log()).logaddexp(log_j + (1 - lam[:, None]).log())
            if self.divergence == "kl":
                return (log_q.exp() * (log_q - log_p)).sum(-1)
            middle = log_q.logaddexp(log_p) - math.log(2)
            # (KL(q || m) + KL(p~ || m)) / 2, where m = (q + p~) / 2
            return 0.5 * (log_q.exp() * (log_q - middle) + log_p.exp() * (log_p - middle)).sum(-1)

        ntp = view.sft_loss(batch, plan.without_pairs())
        (h_i, h_j), lam = view.hidden[plan.pairs].unbind(1), plan.lam[:, None]
        mixture = (lam * h_i + (1 - lam) * h_j).to(h_i.dtype)
        loss, divergences = view.chunked_loss((h_i, h_j, mixture), divergence, plan.lam, row_weight=plan.pair_weight)
        return ntp._replace(loss=ntp.loss + loss, mixup=divergences)
