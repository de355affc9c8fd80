"""Token calibration says how far the probabilities of a model can be trusted. For the T response tokens of the held-out
rows, under teacher forcing, with p_t the model's distribution at token t:

    confidence_t = max_k p_t[k],  correct_t = [argmax_k p_t[k] = y_t]
    ECE    sum_b (n_b / T) |accuracy_b - confidence_b| over 15 bins of equal mass (Nixon et al., arXiv 1904.01685)
    Brier  mean_t sum_k (p_t[k] - [k = y_t])^2 = mean_t (1 - 2 p_t[y_t] + sum_k p_t[k]^2), from 0 to 2
    NLL after temperature scaling (Guo et al., arXiv 1706.04599): softmax(logits / tau), where tau minimises the NLL of
           one half of the examples and is judged on the other half, both ways round

One forward pass over the rows gives all of these, and keeps no logits. The pass gives the NLL with two derivatives at
the 11 temperatures of TAUS; in between, quintic Hermite interpolation gives the NLL as a function of tau. Its error is
below 1e-5 nats and 1e-3 in tau if the curve is as smooth as language models' curves are. A second pass around the
minimum would cost the whole backbone again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sftmix.components.base import Callback, Delivered, StageState
from sftmix.ranks.rng import stable_hash
from sftmix.types import Batch, Float64, Int64, RowLosses, Tensor

N_BINS = 15

# 8, 5.66, 4, 2.83, 2, 1.41, 1, 0.71, 0.5, 0.35, 0.25
TAUS = tuple(2.0 ** (-k / 2) for k in range(-6, 5))
"""Temperatures from 8 down to 1/4: their inverses rise by a factor of sqrt(2)."""

_ONE, _HALF = TAUS.index(1.0), TAUS.index(0.5)

_ROWS = 64
"""Least rows of a matmul with the head: one of a single row takes as long as reading all weights, for every token."""

_LEAST_LOGIT, _LEAST_EXPONENT = -1e4, -87.0
"""No probability of float32 is as small as exp of either. On a CPU exp takes a hundred times as long below -87.3, where
float32 has no normal numbers; a logit may be that far below the largest, and is at a temperature of 1/4."""


class Calibration(Callback):
    """Token calibration of the delivered weights on the held-out rows: ECE, Brier, temperature, reliability curve."""

    gives = frozenset()

    def on_delivered(self, state: StageState) -> Delivered | None:
        """Measure N rows in one pass; `reliability`, in calibration.json alone, has the bins of the curve.

        The figures are those of the table in docs/calibration.md; a model without an NLL for some row has none.
        """
        if state.measure is None:
            return None
        # N entries each: f32[n], bool[n], f64[], f64[11, 3]
        confidences, hits, *sums = state.measure(_statistics)
        brier_sum, tempered = map(np.array, sums)
        n_tokens, n_correct = np.array([len(row) for row in hits]), np.array([row.sum() for row in hits])
        # the NLL at temperature 1
        scores = RowLosses(tempered[:, _ONE, 0], n_tokens, n_correct, {"brier_sum": brier_sum})
        if np.isnan(scores.nll_sum).any():
            return Delivered(scores=scores)
        confidence = np.concatenate(confidences)
        tokens, curve = len(confidence), reliability(confidence, np.concatenate(hits))
        figures = {
            "examples": len(state.held_out),
            "tokens": tokens,
            "nll": float(scores.nll_sum.sum()) / tokens,
            "accuracy": float(n_correct.sum()) / tokens,
            "confidence": float(confidence.mean(dtype=np.float64)),
            "ece": sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in curve) / tokens,
            "brier": float(brier_sum.sum()) / tokens,
            **temperature_scaling(tempered, n_tokens, state.held_out),
        }
        return Delivered({"calibration": figures}, {"calibration.json": {**figures, "reliability": curve}}, scores)


def _statistics(hidden: Tensor, head: Any, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return confidence and correct of each token, to keep, and Brier score and tempered NLL, to add up."""
    confidence, correct, brier, tempered = token_statistics(hidden, head, batch.labels)
    return [confidence, correct], [brier, tempered]


def token_statistics(hidden: Tensor, head: Any, labels: Tensor) -> list[Tensor]:
    """Return for T token rows, through the model's own Head (scale, soft-cap and bias included), float32 or better:

    confidence [T], correct bool[T], Brier score [T], and [T, len(TAUS), 3]: NLL at each temperature tau, and its first
    and second derivative by 1 / tau. One more buffer of the size of a block of logits x [T, V] serves all temperatures.

    With p the distribution at temperature tau and b = 1 / tau, the NLL is log sum_k exp(b x_k) - b x_label; by b its
    first derivative is E_p[x] - x_label, and its second the variance of x under p.
    """
    import torch

    from sftmix.functional.fused import block_rows

    block = block_rows(len(head.weight), hidden.device)
    parts = []
    for h, y in zip(hidden.split(max(block, _ROWS)), labels.split(max(block, _ROWS)), strict=True):
        logits = head.logits(h)
        with torch.autocast(hidden.device.type, enabled=False):
            parts += [_block_statistics(x, y) for x, y in zip(logits.split(block), y.split(block), strict=True)]
        del logits  # before the next ones are made
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _block_statistics(x: Tensor, labels: Tensor) -> list[Tensor]:
    """Return what `token_statistics` does, from logits x [rows, V], which are written over."""
    import torch

    x.sub_(x.amax(1, keepdim=True)).clamp_(min=torch.finfo(x.dtype).min)  # a masked -inf times 0 would be NaN
    at_label = x.gather(1, labels[:, None]).squeeze(1)  # [rows], before small logits are raised
    x.clamp_(min=_LEAST_LOGIT)  # times exp(_LEAST_EXPONENT) it is still nothing
    totals = []
    tempered = []
    e = torch.empty_like(x)  # [rows, V], of every temperature in turn
    for tau in TAUS:
        torch.mul(x, 1 / tau, out=e)
        total = e.clamp_(min=_LEAST_EXPONENT).exp_().sum(1)
        mean = e.mul_(x).sum(1) / total
        square = e.mul_(x).sum(1) / total
        totals.append(total)
        tempered.append(torch.stack([total.log() - at_label / tau, mean - at_label, square - mean**2], 1))
    one = totals[_ONE]
    brier = 1 - 2 * at_label.exp() / one + totals[_HALF] / one**2  # sum_k exp(2 x_k): the total at tau = 1/2
    return [1 / one, x.argmax(1) == labels, brier, torch.stack(tempered, 1)]


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
    """Return the bins that hold tokens, least confident first: mean confidence, accuracy, count.

    The bin of a token is floor(N_BINS (mean rank - 1/2) / T): without ties the sizes differ by at most one. Equal
    values share a bin, wherever they are in the array, so a bin may be large and another empty.
    """
    import pandas as pd
    from scipy.stats import rankdata

    bins = np.floor(N_BINS * (rankdata(confidence) - 0.5) / len(confidence))
    _, place, count = np.unique(bins, return_inverse=True, return_counts=True)
    means = {"confidence": np.bincount(place, confidence) / count, "accuracy": np.bincount(place, correct) / count}
    return pd.DataFrame(means).assign(count=count).to_dict("records")


def temperature_scaling(tempered: Float64, n_tokens: Int64, ids: Sequence[str]) -> dict[str, Any]:
    """Return two-fold cross-fitted NLL per token: each half of the examples at the temperature fitted on the other.

    The halves are drawn by a hash of the ids, so they are the same for every model. `temperature_at_limit` is True if
    a fit ended at the first or last of TAUS.

    tempered  f64[N, len(TAUS), 3], the last of `token_statistics` summed over the tokens of each row
    """
    if len(ids) < 2:  # nothing to fit on
        return dict.fromkeys(("nll_temperature_scaled", "temperature", "temperatures", "temperature_at_limit"))
    ranked = sorted(range(len(ids)), key=lambda i: stable_hash("calibration_fold", ids[i]))
    (first, tau), (second, other) = (fitted_temperature(tempered[sorted(ranked[k::2])].sum(axis=0)) for k in (0, 1))
    judged = float(second(-np.log(tau))) + float(first(-np.log(other)))
    return {
        "nll_temperature_scaled": judged / int(n_tokens.sum()),
        "temperature": (tau + other) / 2,
        "temperatures": [tau, other],
        "temperature_at_limit": not {TAUS[0], TAUS[-1]}.isdisjoint([tau, other]),
    }


def fitted_temperature(sums: Float64) -> tuple[Any, float]:
    """Return the NLL sum as a function of log(1 / tau), and the tau in [TAUS[-1], TAUS[0]] where it is smallest.

    The function is a BPoly: between two of TAUS a quintic that has the values and derivatives of the sums
    f64[len(TAUS), 3] at both. The NLL is convex in 1 / tau, so it has one minimum; if its slope has one sign
    throughout, that is at an end of the range.
    """
    from scipy.interpolate import BPoly
    from scipy.optimize import brentq

    value, first, second = sums.T  # [11] each
    beta = 1 / np.asarray(TAUS)
    # In t = log b: d/dt = b d/db, so f'' = b^2 second + b first.
    curve = BPoly.from_derivatives(
        np.log(beta), np.stack([value, beta * first, beta**2 * second + beta * first], axis=1)
    )
    if first[0] >= 0:  # rises with 1 / tau from the start: hotter than 8
        return curve, TAUS[0]
    if first[-1] <= 0:  # still falls: colder than 1/4
        return curve, TAUS[-1]
    return curve, float(np.exp(-brentq(curve.derivative(), *curve.x[[0, -1]])))
