"""The SFTMix loss as pure functions on tensors: fused (`sft_loss`) and as its specification (`reference_sft_loss`).

    logits   z_t = scale (W h_t + b),   p_t = softmax(cap(z_t)),   cap(z) = softcap tanh(z / softcap)
    NTP      nll_t = -log p_t[y_t]
    Mixup    z~_m = lam_m z_i + (1 - lam_m) z_j for the pair (i, j) = pairs[m],   p~ = softmax(cap(z~)),
             mixup_m = -lam_m log p~[y_i] - (1 - lam_m) log p~[y_j]
    loss     sum_t row_weight_t nll_t + sum_m pair_weight_m mixup_m

(arXiv 2410.05248, section 3). The head is linear, so mixing the logits is the same as mixing the hidden states: Mixup
needs no head matmul of its own. `SFTMixLoss` is the criterion of a padded batch. Other losses of the logits:
`chunked_loss`. Legend as in sftmix.types: T token rows, M pairs of them, D hidden, V vocabulary, B slots of L tokens, P
pairs of slots; the fused kernel is in sftmix.functional.fused.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftmix.functional.chunked import ChunkedLoss, chunked_loss
from sftmix.functional.fused import Pass, default_chunk_size, statistics_dtype, unpaired_rows
from sftmix.functional.graph import check_constants

__all__ = [
    "ChunkedLoss",
    "SFTLoss",
    "SFTMixLoss",
    "align",
    "aligned_pairs",
    "chunked_loss",
    "logits_of",
    "reference_sft_loss",
    "sft_loss",
]

Rule = Callable[[Tensor, Tensor], Tensor]
"""(nll [R], entropy [R]) -> factor [R] of the weights of R token rows."""
IGNORED = -100
"""Label of a token that carries no loss, as in transformers."""


class SFTLoss(NamedTuple):
    """The result of a loss: a scalar with a graph, and statistics, detached, float32 (float64 for float64 inputs).

    nll      [T], -log p of the label in nats, never smoothed
    mixup    [M], cross entropy of the mixed prediction with the mixed label, nats, in the order of `pairs`
    correct  bool[T], True if the label is the argmax (None unless stats)
    entropy  [T], of the prediction, nats (None unless it is asked for)
    prompt   None, or [Q], -log p of the tokens of prompts, if a plan weighs them
    """

    loss: Tensor
    nll: Tensor
    mixup: Tensor
    correct: Tensor | None
    entropy: Tensor | None = None
    prompt: Tensor | None = None


def sft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    pairs: Tensor,
    lam: Tensor,
    *,
    row_weight: Tensor,
    pair_weight: Tensor,
    rule: Rule | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    stats: bool = False,
    entropy: bool = False,
    unpaired: Tensor | None = None,
) -> SFTLoss:
    """Compute NTP and Mixup of T token rows through the LM head, without ever holding [T, V] logits.

    The gradients are computed together with the loss, chunk by chunk (three matmuls with the head, none for Mixup), so
    backward only scales them. Without grad mode, or with nothing that requires grad, no gradient work is done; a frozen
    weight costs no weight gradient. The weight's gradient is accumulated in float32 or better, and all results repeat
    bit for bit on one device. lam, row_weight and pair_weight are constants.

    hidden, weight, bias  [T, D], [V, D], [V]: one floating dtype, or any under autocast, whose dtype the matmuls use
    labels           i64[T] in [0, V), already shifted; there is no ignore value: drop such rows before
    pairs            i64[M, 2] in [0, T): a row may be in several, in none, or paired with itself
    lam              [M], share of column 0: a floating dtype, in [0, 1], which is not checked
    row_weight       [T]; a row of weight 0 carries no NTP loss
    pair_weight      [M]
    rule             (nll [R], entropy [R]) -> factor [R] of the weights of R rows: elementwise, detached
    label_smoothing  in [0, 1), the share of the NTP target that is spread evenly over V, in the loss only
    chunk_size       rows of logits alive at once, >= 1 (a pair needs two); None chooses from V
    stats, entropy   also return correct, or the entropy
    unpaired         i64, the rows in no pair, from a caller who has checked labels and pairs; None checks them and
                     finds these rows, for which the host waits

    Raises ValueError for inputs that do not fit and for constants that require a gradient, RuntimeError on a second
    derivative.
    """
    if not (0 <= label_smoothing < 1 and (softcap is None or softcap > 0) and (chunk_size is None or chunk_size >= 1)):
        raise ValueError(
            f"label_smoothing {label_smoothing}, softcap {softcap}, chunk_size {chunk_size}; allowed: label_smoothing "
            "in [0, 1), softcap above 0 or None, chunk_size at least 1 or None."
        )
    rows, (vocabulary, width), many = len(labels), weight.shape, len(pairs)
    for name, x, *shape in (  # a shape that does not fit might be broadcast
        ("hidden", hidden, rows, width),
        ("labels", labels, rows),
        ("pairs", pairs, many, 2),
        ("lam", lam, many),
        ("pair_weight", pair_weight, many),
        ("bias", bias, vocabulary),
        ("row_weight", row_weight, rows),
    ):
        if x is not None and list(x.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(x.shape)}; with these weight, labels and pairs it must be {shape}."
            )
    check_constants(lam=lam, row_weight=row_weight, pair_weight=pair_weight)
    if unpaired is None:
        # A wrong index would otherwise read another row, or crash a GPU.
        for name, index, limit in (("labels", labels, vocabulary), ("pairs", pairs, rows)):
            if not ((index >= 0) & (index < limit)).all():
                raise ValueError(f"{name} must lie in [0, {limit}), got {index.min()} to {index.max()}.")
        unpaired = unpaired_rows(pairs, rows)
    elif len(unpaired) + 2 * many < rows:  # more is no error: a row may be in several pairs
        raise ValueError(f"unpaired has {len(unpaired)} rows; with {many} pairs of {rows} rows it needs more.")
    head = Pass(hidden, weight, bias, softcap, scale, label_smoothing, rule, stats, entropy)
    size = chunk_size or default_chunk_size(vocabulary, weight.device)
    loss, figures, mixup = head.loss(labels, pairs, lam, row_weight, pair_weight, unpaired, size)
    asked = figures.correct if stats else None, figures.entropy if entropy else None
    return SFTLoss(head.attach(loss), figures.nll, mixup, *asked)


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """Return the logits [..., V] of states [..., D] through the head, float32 or better: cap(scale (W h + b))."""
    z = F.linear(hidden, weight, bias)
    z = scale * z.to(statistics_dtype(z))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def reference_sft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    pairs: Tensor,
    lam: Tensor,
    *,
    row_weight: Tensor,
    pair_weight: Tensor,
    rule: Rule | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    stats: bool = False,
    entropy: bool = False,
) -> SFTLoss:
    """Compute the formula as the paper writes it, under plain autograd, for tests and benchmarks to compare with.

    It mixes hidden states, applies the head to them again, and takes dense soft labels. `chunk_size` has no effect.
    """
    check_constants(lam=lam, row_weight=row_weight, pair_weight=pair_weight)
    formula: dict[str, Any] = {"weight": weight, "bias": bias, "softcap": softcap, "scale": scale}
    logp_TV = logits_of(hidden, **formula).log_softmax(-1)
    nll_T = -logp_TV.gather(1, labels[:, None]).squeeze(1)
    ntp_T = nll_T
    if label_smoothing:  # 0 times the -inf of a masked token would be NaN
        ntp_T = (1 - label_smoothing) * nll_T - label_smoothing * logp_TV.mean(-1)
    w_T = row_weight
    if rule is not None or entropy:
        entropy_T = torch.special.entr(logp_TV.detach().exp()).sum(-1)
    if rule is not None:  # 0 stays 0, whatever the rule returns
        w_T = torch.where(row_weight == 0, 0.0, row_weight * rule(nll_T.detach(), entropy_T))

    (i, j), lam_M1 = pairs.unbind(1), lam.to(logp_TV.dtype)[:, None]
    mixed_MD = lam_M1 * hidden[i] + (1 - lam_M1) * hidden[j]
    soft_MV = logp_TV.new_zeros(len(pairs), len(weight))
    # added, not written: both labels may be one token
    soft_MV.scatter_add_(1, labels[i, None], lam_M1).scatter_add_(1, labels[j, None], 1 - lam_M1)
    mixed_MV = logits_of(mixed_MD.to(hidden.dtype), **formula).log_softmax(-1)
    mixup_M = -(soft_MV * mixed_MV).sum(-1)

    loss = (w_T.detach() * ntp_T).sum() + (pair_weight * mixup_M).sum()
    correct_T = logp_TV.argmax(-1) == labels if stats else None
    return SFTLoss(loss, nll_T.detach(), mixup_M.detach(), correct_T, entropy_T if entropy else None)


class SFTMixLoss(nn.Module):
    """NTP plus mu times Mixup of a padded batch, as a criterion: `sft_loss` with the paper's means."""

    def __init__(self, mu: float = 0.2, mixup_mean: str = "own", **options: Any) -> None:
        """
        mu: weight of Mixup, 0 or above; at 0 nothing is mixed.
        mixup_mean: the Mixup sum is divided by the number of mixed token pairs (own) or of NTP tokens (ntp).
        options: softcap, scale, label_smoothing and chunk_size, as of `sft_loss`.
        """
        super().__init__()
        if mixup_mean not in ("own", "ntp"):
            raise ValueError(f"mixup_mean is {mixup_mean!r}; allowed: own, ntp")
        if not 0 <= mu < float("inf"):
            raise ValueError(f"mu is {mu}; allowed: 0 and above")
        self.mu, self.mixup_mean, self.options = mu, mixup_mean, options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        pairs: Tensor,
        lam: Tensor,
        num_items_in_batch: Tensor | float | None = None,
        num_pairs_in_batch: Tensor | float | None = None,
        *,
        bias: Tensor | None = None,
    ) -> SFTLoss:
        """Return the loss and its statistics; the n-th response token of a slot is mixed with its partner's.

        hidden        [B, L, D], the head's input at every token
        weight, bias  [V, D], [V]; a DTensor is gathered, and its gradient is the mean over the ranks of its mesh
        labels        i64[B, L], the tokens themselves, unshifted; -100 carries no loss
        pairs         i64[P, 2], slots; lam [P], share of column 0, as of `sft_loss`
        num_items_in_batch, num_pairs_in_batch  what the sums are divided by: the trained tokens and the token pairs
                      (`aligned_pairs`) of the whole global batch; both None: this call's, both 1: sums. At mu 0 or
                      mixup_mean ntp num_pairs_in_batch is not used and may be None beside the other
        Raises ValueError for inputs that do not fit, and for one of the counts alone, pairs or no pairs.
        """
        alone = num_items_in_batch is not None and self.mu and self.mixup_mean == "own"
        if (alone and num_pairs_in_batch is None) or (num_items_in_batch is None and num_pairs_in_batch is not None):
            raise ValueError(
                f"num_items_in_batch is {num_items_in_batch} and num_pairs_in_batch is {num_pairs_in_batch}: NTP and "
                "Mixup would be divided by numbers of different batches. Give both for the whole global batch (the "
                "trained tokens, and the sum of len(aligned_pairs(labels, pairs)[0])), or neither"
            )
        if len(lam) != len(pairs):
            raise ValueError(f"lam has {len(lam)} shares for {len(pairs)} pairs; each pair needs one")
        if len(pairs) and not (pairs.min() >= 0 and pairs.max() < len(labels)):
            raise ValueError(
                f"pairs must lie in [0, {len(labels)}), got {pairs.min()} to {pairs.max()}: they number the lines of "
                "labels. If one line holds several documents, call align and sft_loss (docs/own-loop.md)"
            )
        trained, kind = labels[:, 1:] != IGNORED, statistics_dtype(hidden)
        token_pairs, owner = aligned_pairs(labels, pairs if self.mu else pairs[:0])
        items = int(trained.sum()) if num_items_in_batch is None else num_items_in_batch
        mixed = len(token_pairs) if num_pairs_in_batch is None else num_pairs_in_batch
        rows = hidden[:, :-1][trained]  # [T, D], the states one place before their labels

        def share(number: int, count: Tensor | float) -> Tensor:
            return torch.ones(number, dtype=kind, device=hidden.device) / max(count, 1)

        return sft_loss(
            rows,
            _whole(weight),
            labels[:, 1:][trained],
            token_pairs,
            lam[owner],
            row_weight=share(len(rows), items),
            pair_weight=self.mu * share(len(token_pairs), items if self.mixup_mean == "ntp" else mixed),
            bias=_whole(bias),
            **self.options,
        )


def aligned_pairs(labels: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return `align` for labels i64[B, L] and pairs i64[P, 2], as of `SFTMixLoss`."""
    return align((labels[:, 1:] != IGNORED).sum(1), pairs)


def align(size: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return i64[M, 2], the token rows that are mixed, and i64[M], the pair of slots that each belongs to.

    The n-th response token of one slot goes with the n-th of the other, n <= min(N_c, N_u). Positions in the sequence
    would not do: the prompts of the two differ in length.

    size   i64[B], response tokens of each slot, whose token rows follow slot by slot
    pairs  i64[P, 2], slots
    """
    # size [3, 2, 2, 1], pairs [[0, 1], [2, 3]] -> [[0, 3], [1, 4], [5, 7]] and [0, 0, 1]
    first_B, length_P = size.cumsum(0) - size, size[pairs].amin(1)
    owner_M = torch.repeat_interleave(length_P)
    n_M = torch.arange(len(owner_M), device=size.device) - (length_P.cumsum(0) - length_P)[owner_M]
    return first_B[pairs[owner_M]] + n_M[:, None], owner_M


def _whole(weight: Any) -> Any:
    """Return a DTensor as a tensor whose gradient is the mean over ranks, as FSDP's are; any other input as it is."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # each rank's gradient is a part of a sum
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole
