"""The pointwise passes of `sftmix.functional.fused` on a GPU: a Triton kernel for rows, and one for pairs.

Each reads the logits twice, for the log-sum-exps and for the gradients, which it writes in their place: six bytes a
logit in bf16, while torch's passes take some fifty. A pass without gradients reads them once, and takes two. Logits are
bf16, f16 or float32, and all else is float32.

    k = log2(e) max z,   e = 2^(log2(e) z - k),   p = e / sum e,   -log p[y] = log sum e - (log2(e) z[y] - k) / log2(e)

So a logit costs each softmax one multiplication and addition and one exponential; that k is rounded cancels. The logits
of a row are dealt to lanes, RUN neighbours at a time, which one thread holds. A lane has a k and a sum of its own, and
threads meet only after the last logit. What labels add to gradients is written over them at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(4096)
"""Logits of a row that a program holds at once."""
RUN = tl.constexpr(8)
WARPS = 16  # of 32 threads, which hold RUN logits each: a BLOCK
PROGRAMS = 1024
"""Programs of `scale`: a few for each processor of a GPU."""
LOG2E = tl.constexpr(1.4426950408889634)
LOW = tl.constexpr(-1e38)
"""The logits beyond the end of a row. They are finite, as an infinity less itself is NaN."""


@triton.jit
def _logits(x, at, V):
    """The logits of a row at one place or several."""
    return tl.load(x + at, mask=at < V, other=LOW).to(tl.float32)


@triton.jit
def _capped(z, softcap: tl.constexpr):
    """softcap tanh(z / softcap), by the exponential, as Triton has no tanh for all devices; 0: z."""
    if softcap != 0:
        z = softcap - 2 * softcap / (1 + tl.exp2(z * (2 * LOG2E / softcap)))
    return z


@triton.jit
def _highest(top, z):
    """The largest of each lane, of what it had and RUN more."""
    return tl.maximum(top, tl.max(tl.reshape(z, (BLOCK // RUN, RUN)), 1))


@triton.jit
def _none():
    """The k and the sum of each lane before its first logit."""
    return tl.full((BLOCK // RUN,), LOW, tl.float32), tl.full((BLOCK // RUN,), 0.0, tl.float32)


@triton.jit
def _dealt(z, inside, softcap: tl.constexpr):
    """Capped logits as lanes of RUN; those that are not inside the row stay LOW."""
    if softcap != 0:
        z = tl.where(inside, _capped(z, softcap), LOW)
    return tl.reshape(z, (BLOCK // RUN, RUN))


@triton.jit
def _joined(k, total, z):
    """The k and the sum of each lane with RUN more logits."""
    new = tl.maximum(k, tl.max(z, 1) * LOG2E)
    return new, total * tl.exp2(k - new) + tl.sum(tl.exp2(z * LOG2E - new[:, None]), 1)


@triton.jit
def _of_row(k, total):
    """The k and the sum of all lanes."""
    top = tl.max(k, 0)
    return top, tl.sum(total * tl.exp2(k - top), 0)


@triton.jit
def _nll(z, k, total, softcap: tl.constexpr):
    return tl.log(total) - (_capped(z, softcap) * LOG2E - k) / LOG2E


@triton.jit
def _slope(z, k, target, softcap: tl.constexpr):
    """The derivative of the loss by logits z, times the sum; `target` is the labels' share of it."""
    z = _capped(z, softcap)
    slope = tl.exp2(z * LOG2E - k) - target
    if softcap != 0:
        slope *= 1 - (z / softcap) * (z / softcap)
    return slope


@triton.jit
def _store(x, at, gradient, V):
    tl.store(x + at, gradient.to(x.dtype.element_ty), mask=at < V)


@triton.jit
def _rows(x, label, weight, nll, correct, V, softcap: tl.constexpr, trains: tl.constexpr):
    """Fill `nll`; then write gradients over x if it trains, else fill `correct`."""
    row = tl.program_id(0).to(tl.int64)
    x += row * V
    y = tl.load(label + row).to(tl.int32)
    own = _logits(x, y, V)  # read before the row is overwritten
    k, total = _none()
    high, early = k, k
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = _logits(x, at, V)
        k, total = _joined(k, total, _dealt(z, at < V, softcap))
        if not trains:
            high, early = _highest(high, z), _highest(early, tl.where(at < y, z, LOW))
    k, total = _of_row(k, total)
    tl.store(nll + row, _nll(own, k, total, softcap))
    if trains:
        share = tl.load(weight + row) / total
        tl.debug_barrier()  # threads of a program wait for each other: none writes before all have read
        for back in range(0, V, BLOCK):  # from the end, which a cache may still have
            at = (V - 1) // BLOCK * BLOCK - back + tl.arange(0, BLOCK)
            _store(x, at, share * _slope(_logits(x, at, V), k, 0.0, softcap), V)
        tl.debug_barrier()
        _store(x, y, share * _slope(own, k, total, softcap), V)
    else:
        tl.store(correct + row, (own == tl.max(high, 0)) & (own > tl.max(early, 0)))  # the first of several maxima


@triton.jit
def _pair_sums(xi, xj, lam_i, lam_j, V, softcap: tl.constexpr):
    """The k and the sum of row i, of row j and of their mixture."""
    ki, total_i = _none()
    kj, total_j = _none()
    km, total_m = _none()
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a, b = _logits(xi, at, V), _logits(xj, at, V)
        km, total_m = _joined(km, total_m, _dealt(lam_i * a + lam_j * b, at < V, softcap))
        ki, total_i = _joined(ki, total_i, _dealt(a, at < V, softcap))
        kj, total_j = _joined(kj, total_j, _dealt(b, at < V, softcap))
    ki, total_i = _of_row(ki, total_i)
    kj, total_j = _of_row(kj, total_j)
    km, total_m = _of_row(km, total_m)
    return ki, total_i, kj, total_j, km, total_m


@triton.jit
def _pairs(x, label, weight, nll, lam, pair_weight, mixup, M, V, softcap: tl.constexpr):
    """Fill `nll` and `mixup`; then write gradients over x. Pair m is the rows m and M + m of x."""
    i = tl.program_id(0).to(tl.int64)
    j = i + M
    xi, xj = x + i * V, x + j * V
    lam_i = tl.load(lam + i)
    lam_j = 1 - lam_i
    ki, total_i, kj, total_j, km, total_m = _pair_sums(xi, xj, lam_i, lam_j, V, softcap)
    # the logits at both labels, of both rows and of their mixture, and the losses
    yi, yj = tl.load(label + i), tl.load(label + j)
    ii, ij, ji, jj = _logits(xi, yi, V), _logits(xi, yj, V), _logits(xj, yi, V), _logits(xj, yj, V)
    mi, mj = lam_i * ii + lam_j * ji, lam_i * ij + lam_j * jj
    tl.store(nll + i, _nll(ii, ki, total_i, softcap))
    tl.store(nll + j, _nll(jj, kj, total_j, softcap))
    tl.store(mixup + i, lam_i * _nll(mi, km, total_m, softcap) + lam_j * _nll(mj, km, total_m, softcap))
    # gradients, as if no token were a label: w p of each row, and lam w p~ of the mixture, which reaches both
    share_i, share_j = tl.load(weight + i) / total_i, tl.load(weight + j) / total_j
    share_m = tl.load(pair_weight + i) / total_m
    mixed_i, mixed_j = lam_i * share_m, lam_j * share_m
    tl.debug_barrier()  # threads of a program wait for each other: none writes before all have read
    for back in range(0, V, BLOCK):  # from the end, which a cache may still have
        at = (V - 1) // BLOCK * BLOCK - back + tl.arange(0, BLOCK)
        a, b = _logits(xi, at, V), _logits(xj, at, V)
        mixed = _slope(lam_i * a + lam_j * b, km, 0.0, softcap)
        _store(xi, at, share_i * _slope(a, ki, 0.0, softcap) + mixed_i * mixed, V)
        _store(xj, at, share_j * _slope(b, kj, 0.0, softcap) + mixed_j * mixed, V)
    tl.debug_barrier()
    # and at the labels, which may be one
    one = tl.where(yi == yj, 1.0, 0.0)
    at_yi = _slope(mi, km, total_m * (lam_i + lam_j * one), softcap)
    at_yj = _slope(mj, km, total_m * (lam_i * one + lam_j), softcap)
    _store(xi, yi, share_i * _slope(ii, ki, total_i, softcap) + mixed_i * at_yi, V)
    _store(xi, yj, share_i * _slope(ij, ki, total_i * one, softcap) + mixed_i * at_yj, V)
    _store(xj, yi, share_j * _slope(ji, kj, total_j * one, softcap) + mixed_j * at_yi, V)
    _store(xj, yj, share_j * _slope(jj, kj, total_j, softcap) + mixed_j * at_yj, V)


@triton.jit
def _scaled(x, factor, size):
    by = tl.load(factor)
    if by != 1:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            _store(x, at, by * _logits(x, at, size), size)


def differentiate(
    x: Tensor,
    uses: Any,
    lam: Tensor,
    pair_weight: Tensor,
    mixup: Tensor,
    softcap: float | None,
    trains: bool,
) -> None:
    """Turn logits x [K, V] into gradients, in place; fill nll, ntp and mixup. The first rows are the columns of pairs.

    uses  `fused.Figures` of the K rows
    lam, pair_weight, mixup  f32[M], 2 M <= K
    trains  False: only fill nll, ntp and correct; M is 0
    """
    pairs, vocabulary, cap = len(lam), x.shape[1], softcap or 0.0
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        if pairs:
            _pairs[(pairs,)](x, *uses[:3], lam, pair_weight, mixup, pairs, vocabulary, cap, num_warps=WARPS)
        if len(unpaired := x[2 * pairs :]):
            of_unpaired = uses.part(slice(2 * pairs, None))[:4]
            _rows[(len(unpaired),)](unpaired, *of_unpaired, vocabulary, cap, trains, num_warps=WARPS)
    uses.ntp.copy_(uses.nll)


def scale(x: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous x in place by a number on its device, for which the host does not wait; 1 costs no pass."""
    with torch.cuda.device_of(x):
        _scaled[(PROGRAMS,)](x, factor, x.numel(), num_warps=WARPS)
