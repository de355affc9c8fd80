"""Mixup at other places than the input of the LM head. Each costs a second pass of the backbone, over the pairs alone.

The examples of a pair are laid out so that their responses begin at one place. Each has a line of its own, so a pair is
mixed both ways, lambda being the share of the line's own example, and the loss of a token pair is the mean of the two
mixtures. NTP, pairs, lambdas and weights are those of SFTMix. In conversations trained as a whole, token pairs that do
not stand at one place (behind first responses of other lengths) are left out, and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.plain import as_list
from sftmix.common.rng import generator
from sftmix.components.base import Schedule, require, require_one_of
from sftmix.components.objectives import SFTMix
from sftmix.components.view import LossView, SFTLoss
from sftmix.types import Batch, Plan, Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LinesPlan(Plan):
    """A plan with the lines [R, L] of P pairs, R = 2 P: first examples, then second ones. Without pairs R = 2.

    input_ids  i64[R, L]
    mask       bool[R, L], the real tokens
    share      f32[R], lambda of the line's own example
    line, column  i64[2 M], the line of each token row, and the place in it whose state predicts the token; those of
               column 0 of `pairs` before those of column 1
    own, other  i64[2 M], the labels of these rows and of their partners
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
    """Return input_ids i64[B, L] and mask bool[B, L] with the first responses at one place, and column i64[T].

    Raises ConfigError for examples of several documents, which a line cannot keep apart.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    if any(one.starts is not None and len(one.starts) > 1 for one in batch.examples):
        raise ConfigError("Mixup of embeddings or layers needs examples of one document; set data.packing false")
    first = [int(one.target[1:].argmax()) for one in batch.examples]
    ids, column = [], []
    for one, place in zip(batch.examples, first, strict=True):
        start = max(first) - place
        ids.append(torch.from_numpy(np.pad(one.input_ids, (start, 0), constant_values=-1)))
        column.append(start + np.flatnonzero(one.target[1:]))
    padded = pad_sequence(ids, batch_first=True, padding_value=-1)
    return padded.clamp(min=0), padded >= 0, torch.from_numpy(np.concatenate(column))


class ManifoldMixup(SFTMix):
    """Mixup of the states after a decoder layer (arXiv 1806.05236), with the labels mixed as in SFTMix."""

    def __init__(self, *, mu: float | Schedule = 0.2, alpha: float | Schedule = 0.5, layers: int | list[int] = 0):
        """
        mu: weight of the Mixup term, 0 or above; or a Schedule.
        alpha: parameter of Beta(alpha, alpha), above 0; small values keep lambda near 0 or 1. Or a Schedule.
        layers: a decoder layer, from 1, or a list of them, of which each step draws one; 0 is the embeddings.
        """
        super().__init__(mu=mu, alpha=alpha)
        self.layers = as_list(layers)
        allowed = "a number from 0, or several, such as [0, 4, 8]"
        require(min(self.layers, default=-1) >= 0, "objective.layers", layers, allowed)

    def plan(self, batch: Batch, *, step: int, total_steps: int, seed: int) -> Plan:
        import torch

        ids, mask, column = aligned(batch)
        same_place = column[batch.pairs[:, 0]] == column[batch.pairs[:, 1]]
        batch = replace(batch, pairs=batch.pairs[same_place], pair_index=batch.pair_index[same_place])
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        if plan.mu == 0:
            return plan
        # Without pairs a pass is made all the same: under FSDP every rank makes as many.
        slots = batch.slot_pairs if len(batch.slot_pairs) else batch.slot_pairs.new_zeros(1, 2)
        pair, lines, rows = batch.pair_index, slots.T.flatten(), batch.pairs.T.flatten()
        return LinesPlan(
            **{field.name: getattr(plan, field.name) for field in fields(Plan)},
            input_ids=ids[lines],
            mask=mask[lines],
            share=plan.lam.new_ones(len(slots)).index_copy(0, pair, plan.lam).repeat(2),
            line=torch.cat([pair, pair + len(slots)]),
            column=column[rows],
            own=batch.labels[rows],
            other=batch.labels[rows.roll(len(pair))],
            layer=int(generator(seed, "layer", step).choice(self.layers)),
        )

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        import torch
        import torch.nn.functional as F

        ntp = view.sft_loss(batch, plan.without_pairs())
        if not isinstance(plan, LinesPlan):  # mu is 0
            return ntp
        mask, share, half = plan.mask, plan.share[:, None, None], len(plan.mask) // 2

        def mixed(states):
            """Mix the states [R, L, D] of each line with its partner's where both have a token."""
            lam = share.to(torch.promote_types(share.dtype, states.dtype))
            mixture = lam * states + (1 - lam) * states.roll(half, 0)
            return mixture.to(states.dtype).where((mask & mask.roll(half, 0))[:, :, None], states)

        def two_labels(logits, own, other, lam):
            one, two = (F.cross_entropy(logits, labels, reduction="none") for labels in (own, other))
            return lam * one + (1 - lam) * two

        states = view.states(view.embed(plan.input_ids), mask, layer=plan.layer, change=mixed)
        hidden, columns = states[plan.line, plan.column], (plan.own, plan.other, plan.lam.repeat(2))
        loss, each = view.chunked_loss(hidden, two_labels, *columns, row_weight=plan.pair_weight.repeat(2) / 2)
        return ntp._replace(loss=ntp.loss + loss, mixup=each.view(2, -1).mean(0))


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

    Of N aligned response tokens, round((1 - lambda) N) that stand together change places, and each place is trained by
    NTP on the token that stands there.
    """

    def plan(self, batch: Batch, *, step: int, total_steps: int, seed: int) -> Plan:
        import torch

        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        if not isinstance(plan, LinesPlan):
            return plan
        counts = plan.line[: len(plan.lam)].bincount(minlength=len(batch.slot_pairs)).tolist()
        swapped, begin = torch.zeros(len(plan.lam), dtype=torch.bool), 0
        for (first, second), n, share in zip(batch.slot_pairs.tolist(), counts, plan.share.tolist(), strict=False):
            length = round((1 - share) * n)
            start = generator(seed, "cut", step, batch.ids[first], batch.ids[second]).integers(n - length + 1)
            swapped[begin + start : begin + start + length] = True
            begin += n
        labels = torch.where(swapped.repeat(2), plan.other, plan.own)
        ids = plan.input_ids.index_put((plan.line, plan.column + 1), labels)  # what the states predict
        return replace(plan, input_ids=ids, share=torch.ones_like(plan.share), own=labels, other=labels)


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
            q, log_p = lam[:, None] * z_i.softmax(-1) + (1 - lam[:, None]) * z_j.softmax(-1), z.log_softmax(-1)
            if self.divergence == "kl":
                return (q * (q.log() - log_p)).sum(-1)
            middle = (0.5 * (q + log_p.exp())).log()
            return 0.5 * (q * (q.log() - middle) + log_p.exp() * (log_p - middle)).sum(-1)

        ntp = view.sft_loss(batch, plan.without_pairs())
        (h_i, h_j), lam = view.hidden[plan.pairs].unbind(1), plan.lam[:, None]
        mixture = (lam * h_i + (1 - lam) * h_j).to(h_i.dtype)
        loss, each = view.chunked_loss((h_i, h_j, mixture), divergence, plan.lam, row_weight=plan.pair_weight)
        return ntp._replace(loss=ntp.loss + loss, mixup=each)
