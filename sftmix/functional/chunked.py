"""Losses of the logits that are sums over rows, one chunk at a time: [R, V] logits never exist."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sftmix.functional.fused import Pass, default_chunk_size
from sftmix.functional.graph import check_constants


class ChunkedLoss(NamedTuple):
    """The weighted sum, a scalar with a graph; and each loss unweighted, [R], detached, float32 or float64."""

    loss: Tensor
    each: Tensor


def chunked_loss(
    hidden: Tensor | Sequence[Tensor],
    f: Callable[..., Tensor],
    *columns: Tensor,
    row_weight: Tensor | None = None,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_size: int | None = None,
) -> ChunkedLoss:
    """Compute sum_r w_r f(logits_r, columns_r) through the LM head, with its gradients by hidden, weight and bias.

        logits = cap(scale (W h + b)),   cap(z) = softcap tanh(z / softcap)

    `f` runs under plain autograd on some rows at a time, and its first derivative by the logits is exact. Its gradients
    are computed together with the loss, so memory is bounded by the chunk, and backward only scales them. Nothing that
    `f` encloses gets a gradient.

    hidden      [R, D], or several of them: `f` gets the logits of the same rows of each
    weight, bias  [V, D], [V], as in `sft_loss`; under autocast the matmuls have its dtype
    f           (logits [r, V] of each hidden, the columns' rows [r, ...]) -> losses [r]; logits are float32 or float64,
                and finite: -1e30 for a token that a bias of -inf masks
    columns     tensors of R rows, constants: labels, lambdas
    row_weight  w [R], a constant; None: all 1
    chunk_size  rows of logits alive at once, of all `hidden` together; None chooses from V

    Raises ValueError for columns or losses of another length, and for constants that require a gradient;
    RuntimeError on a second derivative.
    """
    parts = [hidden] if isinstance(hidden, Tensor) else list(hidden)
    rows, stacked = len(parts[0]), parts[0] if len(parts) == 1 else torch.cat(parts)
    weights = stacked.new_ones(rows) if row_weight is None else row_weight
    if {rows} != (sizes := {len(x) for x in (*parts, *columns, weights)}):
        raise ValueError(f"hidden, columns and row_weight must have the same number of rows, not {sorted(sizes)}.")
    check_constants(row_weight=row_weight, **{f"column {k}": column for k, column in enumerate(columns)})
    head = Pass(stacked, weight, bias, scale=scale)  # without the cap, which is under autograd below, as f is
    # a quarter of the fused loss's chunk, as autograd holds some tensors of it
    step = max(1, (chunk_size or default_chunk_size(len(weight), weight.device) // 4) // len(parts))
    with torch.no_grad(), torch.autocast(stacked.device.type, enabled=False):
        each, weights = stacked.new_zeros(rows, dtype=head.kind), weights.to(head.kind)
        head.start(weights, chunks=-(-rows // step), repeats=False)
        # [parts, R]; the rows of a chunk are its rows of the first hidden, then of the second: `f` gets them apart
        places = torch.arange(len(stacked), device=stacked.device).view(len(parts), rows)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            place = places[:, part].flatten()
            leaf = head.logits(place, head.weight.new_empty(len(place), len(weight))).requires_grad_(head.trains)
            with torch.set_grad_enabled(head.trains):
                x = leaf.to(head.kind)
                x = x if bias is None else x.clamp(min=-1e30)  # 0 times the -inf of a masked token would be NaN
                x = x if softcap is None else softcap * torch.tanh(x / softcap)
                losses = f(*x.chunk(len(parts)), *(column[part] for column in columns))
                if losses.shape != each[part].shape:
                    raise ValueError(f"f must return one loss per row, {len(each[part])}, not {tuple(losses.shape)}.")
                total = (weights[part] * losses).sum() * head.lift
            each[part] = losses.detach()
            if head.trains:
                head.backward(place, torch.autograd.grad(total, leaf)[0])
    loss = (weights * each).sum()
    return ChunkedLoss(head.attach(loss), each)
