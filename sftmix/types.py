"""Records that travel between the stages, and the shape legend used everywhere.

Legend

    N  examples of the training set        P  pairs of examples (one epoch, or one batch)
    B  slots of a micro-batch (examples)   L  padded length in tokens
    T  token rows of one loss call: the positions that predict a response token
    M  aligned pairs of token rows         D  hidden size
    V  vocabulary size                     C  checkpoints of the reference

A suffix names the shape: `hidden_TD` is [T, D], `lam_M` is [M].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Int64 = npt.NDArray[np.int64]
Rows = Int64
"""Row numbers of the data set, or pairs of them; other whole numbers are Int64."""
Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Tensor: TypeAlias = "torch.Tensor"
"""A torch tensor, for component modules, whose `if TYPE_CHECKING:` blocks the command line executes, without torch."""
TorchOptimizer: TypeAlias = "torch.optim.Optimizer"


# --------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `trained` marks an assistant turn that carries loss.

    A window of plain text is one trained message of the role text.

    weight   multiplies the loss of the turn's tokens
    thought  what the assistant thought before the content, from a field of its own; "" if the row has none there
    more     the turn's other keys, as a chat template takes them: tool_calls, tool_call_id, name
    parts    (text, weight) of parts of the content with weights of their own, which make up the whole content; or none
    """

    role: str
    content: str
    trained: bool = False
    weight: float = 1.0
    thought: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: a conversation with at least one trained assistant turn.

    id       the row's own `id`, or a hash of its canonical content (`#k` for the k-th duplicate)
    source   `file:line`, `file:line[index]` or `file[index]`, for messages to people
    label    the quality or group label of the row, if it has one
    columns  the row's other scalar fields, kept for selectors and splitters
    tools    the functions that the assistant may call, in OpenAI's form, for the chat template
    options  the row's own values of the chat template's variables (chat_template_kwargs)
    """

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    label: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised example.

    row         int, place in the training set, 0..N-1 in file order
    input_ids   i64[length]
    target      bool[length], True if the token is a response token (end-of-turn token included): the token
                itself, unshifted; the position that predicts it is the one before it
    truncated   the response was cut at max_length, so it has no end-of-turn token
    starts      None, or i64[S], where each of the documents packed into this example begins (the first at 0): tokens of
                different documents must not attend to each other, and positions count from each start
    weight      None (all 1), or f32[length], the rows' own weights of the response tokens
    """

    row: int
    id: str
    input_ids: Int64
    target: Bool
    truncated: bool = False
    starts: Int64 | None = None
    weight: Float32 | None = None


# ---------------------------------------------------------------------------- dynamics, scores, split


@dataclass(frozen=True)
class RowScores:
    """The losses of one model on every row of a data set.

    nll_sum    f64[N], nats
    n_tokens   i64[N]
    n_correct  i64[N]
    token_nll  None, or N arrays f32[n_tokens]
    """

    nll_sum: Float64
    n_tokens: Int64
    n_correct: Int64
    token_nll: Sequence[Float32] | None = None


RowScorer = Callable[[Encoded], tuple[Float64, Bool]]
"""A row -> the NLL (nats) of each of its response tokens, f64[n], and whether it is the argmax, bool[n]."""

NOT_COUNTED = -1
"""Marker in place of a number of correct tokens: they were not counted."""


@dataclass(frozen=True)
class TrainingDynamics:
    """The losses of the reference model on every example at each of its C checkpoints.

    ids        N example ids
    steps      i64[C], optimizer step of each checkpoint (0 = before training)
    nll_sum    f64[N, C], sum of -log p over the response tokens, nats
    n_tokens   i64[N], response tokens scored (0: this reference could not score the example)
    n_correct  i64[N, C], response tokens that are the argmax; NOT_COUNTED for online losses
    token_nll  None, or for every example an f32[C, n_tokens] array; rounded to float16 (5e-4 of the value) if read from
               a file, so its sum may differ from nll_sum
    alone_nll_sum  None, or f64[N, C], the same sum for the response without its instruction (what IFD divides by)
    alone_token_nll  None, or its parts, as token_nll
    """

    ids: Sequence[str]
    steps: Int64
    nll_sum: Float64
    n_tokens: Int64
    n_correct: Int64
    token_nll: Sequence[Float32] | None = None
    alone_nll_sum: Float64 | None = None
    alone_token_nll: Sequence[Float32] | None = None

    @property
    def scored(self) -> Bool:
        """bool[N], True if at least one response token of the example is within the reference's length."""
        return self.n_tokens > 0

    @property
    def mean_nll(self) -> Float64:
        """f64[N, C], nats per response token; NaN if the example was not scored."""
        return self.nll_sum / np.where(self.scored, self.n_tokens, np.nan)[:, None]

    def of(self, ids: Sequence[str]) -> TrainingDynamics:
        """Return the dynamics of exactly these `ids`, in their order; an unknown id gets n_tokens 0."""
        place = {example_id: index for index, example_id in enumerate(self.ids)}
        return self._of_rows(ids, np.asarray([place.get(example_id, -1) for example_id in ids], dtype=np.int64))

    def scoring_only(self, mask: Bool) -> TrainingDynamics:
        """Return the dynamics with n_tokens 0, and no numbers, for the examples outside the mask, bool[N]."""
        return self._of_rows(self.ids, np.where(mask, np.arange(len(mask)), -1))

    def _of_rows(self, ids: Sequence[str], rows: Int64) -> TrainingDynamics:
        """Return the dynamics of these rows, which get these ids; row -1 has n_tokens 0, and no numbers."""
        alone, known = self.alone_nll_sum, rows >= 0
        each = known[:, None]

        def of_tokens(nll: Sequence[Float32] | None) -> Sequence[Float32] | None:
            return None if nll is None else [nll[row] if row >= 0 else nll[row][:, :0] for row in rows]

        return replace(
            self,
            ids=list(ids),
            nll_sum=np.where(each, self.nll_sum[rows], 0.0),
            n_tokens=np.where(known, self.n_tokens[rows], 0),
            n_correct=np.where(each, self.n_correct[rows], 0),
            token_nll=of_tokens(self.token_nll),
            alone_nll_sum=None if alone is None else np.where(each, alone[rows], 0.0),
            alone_token_nll=of_tokens(self.alone_token_nll),
        )


@dataclass(frozen=True)
class Scores:
    """The one table that splitters, pair samplers and selectors see; all columns have length N.

    id           example ids
    row          i64[N], 0..N-1
    confidence   f64[N], higher is more confident; NaN if the example could not be scored
    variability  f64[N], standard deviation of the perplexity over the checkpoints
    n_tokens     i64[N], response tokens under the target's tokenizer
    label        None, or N labels
    columns      any user column by name
    texts        None, or what is asked and answered in each row, read when it is asked for
    """

    id: Sequence[str]
    row: Rows
    confidence: Float64
    variability: Float64
    n_tokens: Int64
    label: Sequence[str | None] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    texts: Sequence[tuple[str, str]] | None = None

    def __len__(self) -> int:
        return len(self.row)

    def ranked(self) -> list[int]:
        """Return the rows with a confidence, most confident first, equal ones by id."""
        scored = np.flatnonzero(~np.isnan(self.confidence)).tolist()
        return sorted(scored, key=lambda row: (-self.confidence[row], self.id[row]))


UNPAIRED = -1
"""Marker in place of a group: the example gets NTP, no Mixup."""
UNPAIRED_NAME = "unpaired"
"""What such examples are called in files and pages."""
MOST_GROUPS = 128
"""Most groups of a split, whose numbers are int8, from 0."""


@dataclass(frozen=True)
class Split:
    """The group of every example.

    group  i8[N], index into `names`, or UNPAIRED (-1)
    names  names of the groups, most confident first, at most MOST_GROUPS, each once
    """

    group: npt.NDArray[np.int8]
    names: tuple[str, ...]

    def rows(self, group: int) -> Rows:
        """Return the rows of one group, in file order."""
        return np.flatnonzero(self.group == group).astype(np.int64)

    @property
    def confident(self) -> Rows:
        """Rows of the first group."""
        return self.rows(0)

    @property
    def unconfident(self) -> Rows:
        """Rows of the last group."""
        return self.rows(len(self.names) - 1)

    @property
    def unpaired(self) -> Rows:
        """Rows of no group."""
        return self.rows(UNPAIRED)

    @property
    def labels(self) -> list[str]:
        """Name of the group of each of the N examples, or `unpaired`."""
        names = (*self.names, UNPAIRED_NAME)  # UNPAIRED, which is -1, is the last
        return [names[group] for group in self.group.tolist()]


# ------------------------------------------------------------------------------------- batch and plan


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

    @property
    def n_tokens(self) -> Tensor:
        """i64[B], response tokens of each slot; `bincount` would read the largest one from the device."""
        return self.slot.new_zeros(len(self.ids)).index_add_(0, self.slot, self.slot.new_ones(len(self.slot)))


@dataclass(frozen=True)
class Segment:
    """Slots of similar length, padded together on the right; or slots one after the other in a single line.

    slots        the batch's slot in each line (padding-free: the slots in the line); empty for an idle segment
    input_ids, attention_mask  i64[b, l]; an idle segment is one token that nobody reads
    index        i64[t], flat positions in [b * l] whose hidden states predict a response token
    order        i64[t], the token row (0..T-1 of the batch) of each of these positions
    starts       i32[documents + 1], the flat positions where documents begin, and the end; a line's padding is one
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

        loss = (sum_t row_weight_t nll_t) / ntp_count
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
    alone            None, or i64, the token rows in no pair; the step finds them on the host, where it checks a plan
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
    alone: Tensor | None = None

    def without_pairs(self, row_weight: Tensor | None = None) -> Plan:
        """Return the plan of NTP alone, with its own row weights [T] or these."""
        import torch

        weight = self.row_weight if row_weight is None else row_weight
        nothing, alone = self.lam[:0], torch.arange(len(weight), device=weight.device)
        return replace(self, row_weight=weight, pairs=self.pairs[:0], pair_weight=nothing, lam=nothing, alone=alone)
