"""A micro-batch, and what an objective plans for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sftmix.types.arrays import Tensor
from sftmix.types.rows import Encoded


@dataclass(frozen=True)
class BatchNLL:
    """NLL of the G distinct examples of the whole global batch, under the model in eval mode before this step.

    Repeated slots, and fillers of ranks without work, are left out. All ranks and micro-batches have the same values.
    rows      i64[G], dataset rows, ascending
    nll_sum   f64[G], nats; 0 if it is not finite: the step is skipped, as the example spoils its loss
    n_tokens  i64[G], response tokens
    ids       G example ids
    """

    rows: Tensor
    nll_sum: Tensor
    n_tokens: Tensor
    ids: Sequence[str] = ()


@dataclass(frozen=True)
class PromptTokens:
    """The Q tokens of a micro-batch's examples that are no response tokens and that some token precedes.

    The hidden state one position earlier predicts `labels[q]`, as for response tokens. They are in no pair.
    labels  i64[Q]
    slot    i64[Q], the slot each belongs to
    """

    labels: Tensor
    slot: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank, already aligned for the losses.

    Every slot is an example; a slot may be a repeat that carries no NTP loss (`ntp_weight` 0). Token rows are the
    response tokens of all slots, slot after slot. The hidden state one position earlier predicts `labels[t]`; the batch
    is already shifted by this position.

    ids          B example ids
    rows         i64[B], dataset rows
    ntp_weight   f32[B], 1, or 0 for a repeated slot
    group        i64[B], group in the split (0 the most confident), -1 = unpaired or no split
    n_groups     number of groups in the split, 0 without one
    labels       i64[T]
    slot         i64[T], the slot each token row belongs to
    slot_pairs   i64[P, 2], paired slots, column 0 the more confident
    pairs        i64[M, 2], token rows: n-th response token with n-th response token, n <= min(N_c, N_u)
    pair_index   i64[M], the pair (row of slot_pairs) each aligned token pair belongs to
    segments     the padded inputs of the backbone: slots of similar length go through it together
    batch_nll    the NLL of the global batch, for objectives that need it (Need.BATCH_NLL); else None
    weight       None (all 1), or f32[T], the rows' own weights of the response tokens
    examples     the B examples themselves
    prompt       the tokens of the prompts, for objectives that need them (Need.PROMPTS); else None
    """

    ids: tuple[str, ...]
    rows: Tensor
    ntp_weight: Tensor
    group: Tensor
    n_groups: int
    labels: Tensor
    slot: Tensor
    slot_pairs: Tensor
    pairs: Tensor
    pair_index: Tensor
    segments: tuple[Segment, ...]
    batch_nll: BatchNLL | None = None
    weight: Tensor | None = None
    examples: tuple[Encoded, ...] = ()
    prompt: PromptTokens | None = None

    @property
    def n_tokens(self) -> Tensor:
        """i64[B], response tokens of each slot; `bincount` would read the largest one from the device."""
        return self.slot.new_zeros(len(self.ids)).index_add_(0, self.slot, self.slot.new_ones(len(self.slot)))


@dataclass(frozen=True)
class Segment:
    """Slots of similar length, padded together on the right; or slots one after the other in a single line.

    slots        the batch's slot in each line (padding-free: the slots in the line); empty for an idle segment
    input_ids, attention_mask  i64[b, l]; an idle segment is one token that nobody reads
    index        i64[t], flat positions in [b * l] whose hidden states predict a response token, or a prompt's
    order        i64[t], the token row (0..T-1 of the batch, from T on its prompts' tokens) of each of these positions
    starts       i32[documents + 1], the flat positions where documents begin, and the end; padding counts as a document
    position_ids  None, or i64[b, l], counted from the start of each document if a line holds several: the model then
                 gets these, no attention mask, and must keep the documents apart (`sftmix.model.packing`)
    lengths      None, or the number of tokens of each slot in the single line
    padded       False if attention_mask has no zero
    """

    slots: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    index: Tensor
    order: Tensor
    starts: Tensor
    position_ids: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    padded: bool = True


@dataclass(frozen=True)
class Plan:
    """The weights that an objective gives one micro-batch, unnormalised.

        loss = (sum_t row_weight_t nll_t + sum_q prompt_weight_q nll_q) / ntp_count
             + (sum_m pair_weight_m mixup_m) / mixup_count

    where the step replaces both counts by their sums over the whole global batch (all ranks, all accumulation steps).

    Weights are float32 or, if they are fractions, float64; the loss takes them in its own precision.
    row_weight       [T]
    pairs            i64[M, 2], token-row pairs to mix; empty when nothing is mixed (mu = 0)
    pair_weight      [M], mu included
    lam              f32[M], lambda of column 0
    ntp_count        this micro-batch's part of the NTP denominator (usually: trained response tokens)
    mixup_count      its part of the Mixup denominator (usually: aligned token pairs)
    mu               the mu that pair_weight was multiplied with; the log divides by it, the loss does not use it
    mixup_mean       "own": Mixup is divided by mixup_count; "ntp": by ntp_count
    unpaired         None, or i64, the token rows in no pair; the step finds them on the host, where it checks a plan
    prompt_weight    None (0), or [Q], of the tokens in `batch.prompt`
    An objective whose `loss` needs more may return a subclass with more fields.
    """

    row_weight: Tensor
    pairs: Tensor
    pair_weight: Tensor
    lam: Tensor
    ntp_count: float
    mixup_count: float
    mu: float = 0.0
    mixup_mean: str = "own"
    unpaired: Tensor | None = None
    prompt_weight: Tensor | None = None

    def without_pairs(self, row_weight: Tensor | None = None) -> Plan:
        """Return the plan of NTP alone, with its own row weights [T] or these."""
        import torch

        weight = self.row_weight if row_weight is None else row_weight
        nothing, unpaired = self.lam[:0], torch.arange(len(weight), device=weight.device)
        no_pairs = replace(self, pairs=self.pairs[:0], lam=nothing, pair_weight=nothing)
        return replace(no_pairs, row_weight=weight, unpaired=unpaired)
