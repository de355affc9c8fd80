"""The pointwise passes of `sftmix.functional.fused` on a GPU: a Triton kernel for rows, and one for pairs.

Each reads the logits twice, for the log-sum-exps and for the gradients, which it writes in their place: six bytes a
logit in bf16, while torch's passes take some fifty. Logits are bf16, f16 or float32, and all else is float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits of a row that a program holds at once."""


@triton.jit
def _logits(x, at, V):
    """The logits of a row at one place or several, 0 beyond its end."""
    return tl.load(x + at, mask=at < V, other=0.0).to(tl.float32)


@triton.jit
def _capped(z, softcap: tl.constexpr):
    """softcap tanh(z / softcap), by the sigmoid, as Triton has no tanh for all devices; 0: z."""
    if softcap != 0:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return z


@triton.jit
def _slope(z, softcap: tl.constexpr):
    """The derivative of `_capped` where its value is z."""
    slope = 1.0
    if softcap != 0:
        slope -= (z / softcap) * (z / softcap)
    return slope


@triton.jit
def _joined(top, total, z, inside):
    """The maximum, and the sum of exp(z - maximum), together with another block, as far as it is inside the row."""
    z = tl.where(inside, z, float("-inf"))
    new = tl.maximum(top, tl.max(z, 0))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)


@triton.jit
def _rows(x, label, weight, nll, V, softcap: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * V
    y, top, total = tl.load(label + row), float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        top, total = _joined(top, total, _capped(_logits(x, at, V), softcap), at < V)
    tl.store(nll + row, tl.log(total) - (_capped(_logits(x, y, V), softcap) - top))
    w = tl.load(weight + row)
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = _capped(_logits(x, at, V), softcap)
        gradient = w * (tl.exp(z - top) / total - tl.where(at == y, 1.0, 0.0)) * _slope(z, softcap)
        tl.store(x + at, gradient.to(x.dtype.element_ty), mask=at < V)


@triton.jit
def _pairs(x, label, weight, nll, lam, pair_weight, mixup, M, V, softcap: tl.constexpr, BLOCK: tl.constexpr):
    """Pair m is the rows m and M + m of x."""
    i = tl.program_id(0).to(tl.int64)
    j = i + M
    xi, xj, yi, yj = x + i * V, x + j * V, tl.load(label + i), tl.load(label + j)
    share = tl.load(lam + i)
    top_i, top_j, top_m, total_i, total_j, total_m = float("-inf"), float("-inf"), float("-inf"), 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a, b = _logits(xi, at, V), _logits(xj, at, V)
        mixed = _capped(share * a + (1 - share) * b, softcap)
        top_i, total_i = _joined(top_i, total_i, _capped(a, softcap), at < V)
        top_j, total_j = _joined(top_j, total_j, _capped(b, softcap), at < V)
        top_m, total_m = _joined(top_m, total_m, mixed, at < V)
    ii, ji, ij, jj = _logits(xi, yi, V), _logits(xj, yi, V), _logits(xi, yj, V), _logits(xj, yj, V)
    tl.store(nll + i, tl.log(total_i) - (_capped(ii, softcap) - top_i))
    tl.store(nll + j, tl.log(total_j) - (_capped(jj, softcap) - top_j))
    at_yi, at_yj = _capped(share * ii + (1 - share) * ji, softcap), _capped(share * ij + (1 - share) * jj, softcap)
    tl.store(mixup + i, tl.log(total_m) - share * (at_yi - top_m) - (1 - share) * (at_yj - top_m))
    wi, wj, wm = tl.load(weight + i), tl.load(weight + j), tl.load(pair_weight + i)
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a, b = _logits(xi, at, V), _logits(xj, at, V)
        z = _capped(share * a + (1 - share) * b, softcap)
        own_i, own_j = tl.where(at == yi, 1.0, 0.0), tl.where(at == yj, 1.0, 0.0)
        both = wm * (tl.exp(z - top_m) / total_m - share * own_i - (1 - share) * own_j) * _slope(z, softcap)
        a, b = _capped(a, softcap), _capped(b, softcap)
        gradient = wi * (tl.exp(a - top_i) / total_i - own_i) * _slope(a, softcap) + share * both
        tl.store(xi + at, gradient.to(x.dtype.element_ty), mask=at < V)
        gradient = wj * (tl.exp(b - top_j) / total_j - own_j) * _slope(b, softcap) + (1 - share) * both
        tl.store(xj + at, gradient.to(x.dtype.element_ty), mask=at < V)


def gradients(x: Tensor, uses: Any, lam: Tensor, pair_weight: Tensor, mixup: Tensor, softcap: float | None) -> None:
    """Turn logits x [K, V] into gradients, in place; fill nll, ntp and mixup. The first rows are the columns of pairs.

    uses  `fused.Figures` of the K rows, of which both kernels take label, weight and nll
    lam, pair_weight, mixup  f32[M], 2 M <= K
    """
    pairs, vocabulary = len(lam), x.shape[1]
    options = {"softcap": softcap or 0.0, "BLOCK": min(BLOCK, triton.next_power_of_2(vocabulary)), "num_warps": 8}
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        if pairs:
            _pairs[(pairs,)](x, *uses[:3], lam, pair_weight, mixup, pairs, vocabulary, **options)
        if len(alone := x[2 * pairs :]):
            _rows[(len(alone),)](alone, *uses.part(slice(2 * pairs, None))[:3], vocabulary, **options)
    uses.ntp.copy_(uses.nll)
