"""Token calibration on held-out rows: how far the probabilities of a model can be trusted.

For the T response tokens of the held-out rows, under teacher forcing, with p_t the model's distribution at token t:

    confidence_t = max_k p_t[k],  correct_t = [argmax_k p_t[k] = y_t]
    ECE    sum_b (n_b / T) |accuracy_b - confidence_b| over 15 bins of equal mass (Nixon et al., arXiv 1904.01685)
    Brier  mean_t sum_k (p_t[k] - [k = y_t])^2 = mean_t (1 - 2 p_t[y_t] + sum_k p_t[k]^2), from 0 to 2
    NLL after temperature scaling (Guo et al., arXiv 1706.04599): softmax(logits / tau), where tau minimises the NLL of
           one half of the examples and is judged on the other half, both ways round

One forward pass over the rows gives all of these, and keeps no logits. The pass gives the NLL with two derivatives at
the 11 temperatures of TAUS; in between, quintic Hermite interpolation gives the NLL as a function of tau. Its error is
below 1e-5 nats and 1e-3 in tau if the curve is as smooth as those of language models are. A second pass around the
minimum would cost the whole backbone again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sftmix.batches.order import TokenisedRows
from sftmix.common.rng import stable_hash
from sftmix.functional.fused import block_rows, statistics_dtype
from sftmix.training.module import TrainingModule
from sftmix.training.scoring import Column, Scorer, refuse_nan, split_by_row, sum_by_row
from sftmix.types import Batch, Float64, Int64, RowScores

N_BINS = 15

TAUS = tuple(2.0 ** (-k / 2) for k in range(-6, 5))
"""Temperatures from 8 down to 1/4: their inverses rise by a factor of sqrt(2)."""

_ONE, _HALF = TAUS.index(1.0), TAUS.index(0.5)


# ------------------------------------------------------------------------------------------- measuring


def calibrate(module: nn.Module, data: TokenisedRows, scorer: Scorer) -> tuple[RowScores, Float64, dict[str, Any]]:
    """Measure N rows in one pass, together with all ranks: their scores, Brier sums f64[N], and the figures.

    The figures are the same on each rank: ECE, Brier, NLL before and after temperature scaling, reliability curve.
    `reliability` has the bins of the curve, each with mean confidence, accuracy and number of tokens; the other figures
    are those of the table in docs/calibration.md. Raises NonFiniteError if a row has no NLL.
    """
    confidences, hits, *sums = scorer.columns(module, data, _measure)
    brier_sum, tempered = map(np.array, sums)
    n_tokens, n_correct = np.array([len(row) for row in hits]), np.array([row.sum() for row in hits])
    scores = refuse_nan(RowScores(tempered[:, _ONE, 0].copy(), n_tokens, n_correct))
    confidence = np.concatenate(confidences)
    tokens, curve = len(confidence), reliability(confidence, np.concatenate(hits))
    figures = {
        "examples": len(data),
        "tokens": tokens,
        "nll": float(scores.nll_sum.sum()) / tokens,
        "accuracy": int(n_correct.sum()) / tokens,
        "confidence": float(confidence.mean(dtype=np.float64)),
        "ece": sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in curve) / tokens,
        "brier": float(brier_sum.sum()) / tokens,
        **temperature_scaling(tempered, n_tokens, data.ids),
        "reliability": curve,
    }
    return scores, brier_sum, figures


def _measure(module: TrainingModule, batch: Batch) -> Sequence[Column]:
    """Return of each row what `token_statistics` returns: that of its tokens, or the sum over them."""
    confidence, correct, *summed = module.read(
        lambda it: token_statistics(it.hidden_states(batch), it.head, batch.labels)
    )
    of_tokens = [split_by_row(column, batch) for column in (confidence, correct)]
    return [*of_tokens, *(sum_by_row(column, batch) for column in summed)]


def token_statistics(hidden: Tensor, head: Any, labels: Tensor) -> list[Tensor]:
    """Return of T token rows, through the model's own Head (scale, soft-cap and bias included), float32 or better:

    confidence [T], correct bool[T], Brier score [T], and [T, len(TAUS), 3]: NLL at each temperature tau, and its first
    and second derivative by 1 / tau. Two buffers of a block of logits are alive at once.
    """
    kind, device = statistics_dtype(hidden), hidden.device.type
    block = block_rows(len(head.weight), hidden.device)
    parts = []
    for start in range(0, max(1, len(labels)), block):
        logits = head.logits(hidden[start : start + block], dtype=kind)
        with torch.autocast(device, enabled=False):
            parts.append(_of_logits(logits, labels[start : start + block]))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _of_logits(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return the statistics of a block of logits x [T, V]; one buffer of its size serves all temperatures.

    With p the distribution at temperature tau and b = 1 / tau, the NLL is log sum_k exp(b x_k) - b x_label; by b its
    first derivative is E_p[x] - x_label, and its second the variance of x under p.
    """
    x = (x - x.amax(1, keepdim=True)).clamp_(min=torch.finfo(x.dtype).min)  # a masked -inf times 0 would be NaN
    at_label = x.gather(1, labels[:, None]).squeeze(1)
    totals, tempered, e = [], [], torch.empty_like(x)
    for tau in TAUS:
        torch.mul(x, 1 / tau, out=e)
        total = e.exp_().sum(1)
        mean = e.mul_(x).sum(1) / total
        square = e.mul_(x).sum(1) / total
        totals.append(total)
        tempered.append(torch.stack([total.log() - at_label / tau, mean - at_label, square - mean**2], 1))
    one = totals[_ONE]
    brier = 1 - 2 * at_label.exp() / one + totals[_HALF] / one**2  # sum_k exp(2 x_k) is the total at tau = 1/2
    return 1 / one, x.argmax(1) == labels, brier, torch.stack(tempered, 1)


# ------------------------------------------------------------------------------------------- reporting


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
    """Return the bins that hold tokens, least confident first: mean confidence, accuracy, count.

    The bin of a token is floor(N_BINS (mean rank - 1/2) / T): without ties the sizes differ by at most one. Equal
    values share a bin, wherever they stand in the array, so a bin may be large and another empty.
    """
    from scipy.stats import rankdata

    bins = np.floor(N_BINS * (rankdata(confidence) - 0.5) / len(confidence)).astype(np.int64)
    counts, sums, hits = (np.bincount(bins, weights=values) for values in (None, confidence, correct))
    return [
        {"confidence": float(sums[b] / counts[b]), "accuracy": float(hits[b] / counts[b]), "count": int(counts[b])}
        for b in np.flatnonzero(counts)
    ]


def temperature_scaling(tempered: Float64, n_tokens: Int64, ids: Sequence[str]) -> dict[str, Any]:
    """Return two-fold cross-fitted NLL per token: each half of the examples at the temperature fitted on the other.

    The halves are drawn by a hash of the ids, so they are the same for every model. `temperature_at_limit` is True if
    a fit ended at the first or last of TAUS.

    tempered  f64[N, len(TAUS), 3], the last of `token_statistics` summed over the tokens of each row
    """
    if len(ids) < 2:  # nothing to fit on
        return dict.fromkeys(("nll_temperature_scaled", "temperature", "temperatures", "temperature_at_limit"))
    ranked = sorted(range(len(ids)), key=lambda i: stable_hash("calibration_fold", ids[i]))
    curves = [nll_curve(tempered[sorted(ranked[k::2])].sum(axis=0)) for k in (0, 1)]
    taus = [best_temperature(curve) for curve in curves]
    judged = [float(curve(-np.log(tau))) for curve, tau in zip(reversed(curves), taus, strict=True)]
    return {
        "nll_temperature_scaled": sum(judged) / int(n_tokens.sum()),
        "temperature": sum(taus) / 2,
        "temperatures": taus,
        "temperature_at_limit": not {TAUS[0], TAUS[-1]}.isdisjoint(taus),
    }


def nll_curve(sums: Float64) -> Any:
    """Return a BPoly, the NLL sum as a function of log(1 / tau): between two of TAUS a quintic that has the values and
    derivatives of the sums f64[len(TAUS), 3] at both."""
    from scipy.interpolate import BPoly

    value, first, second = sums.T
    beta = 1 / np.asarray(TAUS)
    derivatives = np.stack([value, beta * first, beta**2 * second + beta * first], axis=1)
    return BPoly.from_derivatives(np.log(beta), derivatives)


def best_temperature(curve: Any) -> float:
    """Return the tau in [TAUS[-1], TAUS[0]] with the smallest NLL, which is convex in 1 / tau: it has one minimum.

    curve  of `nll_curve`. Where its slope has one sign throughout, the minimum is at an end of the range.
    """
    from scipy.optimize import brentq

    slope, low, high = curve.derivative(), curve.x[0], curve.x[-1]
    if slope(low) >= 0:
        return TAUS[0]
    if slope(high) <= 0:
        return TAUS[-1]
    return float(np.exp(-brentq(slope, low, high)))
