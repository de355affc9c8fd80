"""The fused pass of `sftmix.functional.sft_loss`: loss and gradients together, chunk by chunk.

    for each chunk:  logits = one head matmul;  logits -> d loss / d logits, block by block, in place;
                     two matmuls carry the result to the hidden states and the head

Three levels. A *use* is one place of a token row in the pass: a row in several pairs has several uses, and the first
one carries its NTP loss. A *chunk* of K uses shares one logits buffer and the matmuls; both uses of a pair are in one
chunk, laid out as [column 0 of its pairs, column 1 of its pairs, unpaired rows]. A *block* of R rows goes through all
pointwise passes before the next one starts, so that on CPU it stays in the caches; Mixup's own buffers are one block
large.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sftmix.functional.graph import GradientsInForward, scaled

CPU_BLOCK_CELLS, BLOCK_CELLS = 2**18, 2**26
"""Logits of a block on CPU (1 MiB, the fastest of 2^16 to 2^21) and on an accelerator."""


class Figures(NamedTuple):
    """The figures of K uses during the pass, of the T token rows at its end; float32 or better.

    label i64, correct bool
    """

    label: Tensor
    weight: Tensor  # 0 unless it is the first use of its row
    nll: Tensor
    correct: Tensor
    entropy: Tensor  # of the prediction, nats; 0 unless it is asked for
    ntp: Tensor  # nll with label smoothing

    def part(self, index: slice | Tensor) -> Figures:
        return Figures(*(x[index] for x in self))


def default_chunk_size(vocabulary: int, device: torch.device) -> int:
    """Return the rows of a chunk: 128 MiB of float32 logits on CPU, 1.25 GiB of bf16 ones on an accelerator.

    That is room for 4,096 rows at a vocabulary of 151,936, where chunks of 1,640 rows took 1.04 of the time on an H200.
    """
    cells = 2**25 if device.type == "cpu" else 5 * 2**27
    return max(64, min(4096, cells // vocabulary))


def block_rows(vocabulary: int, device: torch.device) -> int:
    """Return the rows of a block, at least 1."""
    return max(1, (CPU_BLOCK_CELLS if device.type == "cpu" else BLOCK_CELLS) // vocabulary)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of softmax, losses and accumulated gradients: float32 or better."""
    return torch.promote_types(x.dtype, torch.float32)


def unpaired_rows(pairs: Tensor, rows: int) -> Tensor:
    """Return i64, the rows of 0..rows-1 that are in no pair, ascending; the host waits for the device to count them."""
    unpaired = torch.ones(rows, dtype=torch.bool, device=pairs.device)
    unpaired[pairs.flatten()] = False
    return unpaired.nonzero().squeeze(1)


def _chunks(pairs: Tensor, unpaired: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the pairs of each chunk and all its token rows: first chunks of pairs, then rows in no pair."""
    total = 2 * len(pairs) + len(unpaired)
    # Nearly equal sizes: a small last chunk would cost a pass over the weight's gradient like a full one.
    size = min(size, -(-total // -(-total // size)) + 1) if total else size
    p = s = 0
    while p < len(pairs) or s < len(unpaired):
        paired = pairs[p : p + max(1, size // 2)].T.flatten()  # [[0, 3], [1, 4]] -> [0, 1, 3, 4]
        single = unpaired[s : s + max(0, size - len(paired))]
        yield slice(p, p + len(paired) // 2), torch.cat([paired, single])
        p, s = p + len(paired) // 2, s + len(single)


@dataclass
class Pass:
    """One pass through the LM head: its inputs, cast for the matmuls, its settings, and the gradients so far.

    rule   as of `sft_loss`
    stats  True to compute correct as well, entropy True to compute the entropy
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None = None
    scale: float = 1.0
    smoothing: float = 0.0
    rule: Callable[[Tensor, Tensor], Tensor] | None = None
    stats: bool = False
    entropy: bool = False

    def __post_init__(self) -> None:
        # Grad mode and autocast are read here: in the pass both are off, as autocast would round more than matmuls.
        self.inputs: list[Any] = [self.hidden, self.weight, self.bias]
        device = self.hidden.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.no_grad():
            self.hidden, self.weight, self.bias = (
                x if x is None or cast is None or x.dtype == torch.float64 else x.to(cast) for x in self.inputs
            )
        kinds = [x.dtype for x in (self.hidden, self.weight, self.bias) if x is not None]
        if {*kinds} != {kinds[0]}:
            raise ValueError(
                f"hidden, weight and bias are of {kinds}, and must be of one floating dtype: cast them, or call the "
                "loss inside autocast, which casts all but float64"
            )
        self.kind = statistics_dtype(self.hidden)
        grad = torch.is_grad_enabled()
        self.trained = [grad and x is not None and x.requires_grad for x in self.inputs]
        self.trains = any(self.trained)

    @cached_property
    def kernels(self) -> Any:
        """The module of the Triton kernels; None on a CPU, in float64, and where they do not work."""
        if self.hidden.device.type not in ("cuda", "xpu") or self.kind == torch.float64:
            return None
        return working_kernels(self.hidden.device, self.hidden.dtype, self.softcap)

    def fits_kernels(self, pairs: Tensor) -> bool:
        """Return True if the Triton kernels compute it: stats only without gradients, pairs only with them."""
        return not (self.rule or self.smoothing or self.entropy or (self.stats if self.trains else len(pairs)))

    def start(self, *weights: Tensor, chunks: int, repeats: bool) -> None:
        """Make room for the gradients, and choose what lifts those of float16 logits.

        Weights such as 1/tokens would underflow there before any GradScaler sees them: the lift is the power of two
        that brings the largest to [1/4, 1/2). The caller multiplies the weights, `backward` divides its float32 sums.

        chunks   how many; the first one writes the weight's gradient, the others add to it. If it is the only one, a
                 bf16 weight's is rounded once, to bf16, and needs no sum in float32
        repeats  False if no row is in two chunks, or twice in one: then the gradient of `hidden` is written, not added
        """
        self.repeats = repeats
        self.beta = 0.0  # of the weight's gradient
        self.lift = 1.0
        if self.trains and self.hidden.dtype == torch.float16:
            largest = max((float(weight.abs().max()) for weight in weights if len(weight)), default=0.0)
            self.lift = 2.0 ** (-1 - math.frexp(largest)[1])  # 1/300 -> 128, and 2 -> 1/8

        def room(place: int, kind: torch.dtype, blank: bool) -> Tensor | None:
            make = torch.zeros_like if blank else torch.empty_like
            x = self.inputs[place]
            return make(x, dtype=kind, memory_format=torch.contiguous_format) if self.trained[place] else None

        rounded = chunks == 1 and self.inputs[1].dtype == self.weight.dtype == torch.bfloat16
        rounded = rounded and (self.weight.is_cpu or self.kernels is not None)  # others scale it by a bf16 number
        of_weight = torch.bfloat16 if rounded else self.kind
        self.gradients = [room(0, self.kind, repeats), room(1, of_weight, not chunks), room(2, self.kind, True)]

    def loss(
        self,
        labels: Tensor,
        pairs: Tensor,
        lam: Tensor,
        row_weight: Tensor,
        pair_weight: Tensor,
        unpaired: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Figures, Tensor]:
        """Return the loss, detached, the figures of all T rows and mixup [M]; the gradients stay here."""
        with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
            kind, vocabulary, device = self.kind, len(self.weight), labels.device
            # the token row of each use, in the order of the chunks; the first use of each row; the figures of each use
            chunks = list(_chunks(pairs, unpaired, chunk_size))
            row = torch.cat([labels.new_empty(0), *(rows for _, rows in chunks)])
            place = torch.arange(len(row), device=device)
            first = place.new_full(labels.shape, len(row)).scatter_reduce(0, row, place, "amin")
            self.start(row_weight, pair_weight, chunks=len(chunks), repeats=len(row) > len(labels))
            use_weight = torch.where(first[row] == place, row_weight.to(kind)[row] * self.lift, 0.0)
            nll, entropy, ntp = torch.zeros(3, len(row), dtype=kind, device=device)
            uses = Figures(labels[row], use_weight, nll, torch.zeros_like(row, dtype=torch.bool), entropy, ntp)
            of_pairs = (
                lam.to(kind),
                pair_weight.to(kind) * self.lift,
                torch.zeros(len(pairs), dtype=kind, device=device),
            )
            # the buffers that all chunks share; those of one block are made when first asked for
            logits = self.weight.new_empty(max((len(rows) for _, rows in chunks), default=0), vocabulary)
            height = block_rows(vocabulary, device)
            empty = partial(torch.empty, min(height, len(logits)), vocabulary, dtype=kind, device=device)
            self.spare = defaultdict[str, Tensor](empty)

            kernels = self.kernels if self.fits_kernels(pairs) else None
            # chunk by chunk: logits, their gradients in place, and the gradients of the head's inputs
            start = 0
            for in_chunk, rows in chunks:
                x_KV = self.logits(rows, logits[: len(rows)])
                chunk_uses = uses.part(slice(start, start + len(rows)))
                start += len(rows)
                lam_M, weight_M, mixup_M = (x[in_chunk] for x in of_pairs)
                if kernels is not None:
                    kernels.differentiate(x_KV, chunk_uses, lam_M, weight_M, mixup_M, self.softcap, self.trains)
                else:
                    self.differentiate(x_KV, chunk_uses, lam_M, weight_M, mixup_M, height)
                self.backward(rows, x_KV)
            of_rows, (_, pair_weight, mixup) = uses.part(first), of_pairs
            total = (of_rows.weight * of_rows.ntp).sum() + (pair_weight * mixup).sum()
            return total / self.lift, of_rows, mixup

    def attach(self, loss: Tensor) -> Tensor:
        """Return the loss with a graph that holds its gradients; as it is if nothing is trained."""
        return GradientsInForward.apply(loss, self.gradients, self.kernels, *self.inputs) if self.trains else loss

    # ------------------------------------------------------------------------------------------------ matmuls

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """Write scale (hidden[rows] W^T + bias) into `out` and return it."""
        start, beta = (out, 0.0) if self.bias is None else (self.bias, self.scale)
        return torch.addmm(start, self.hidden[rows], self.weight.T, beta=beta, alpha=self.scale, out=out)

    def backward(self, rows: Tensor, d_KV: Tensor) -> None:
        """Add the gradients of hidden, weight and bias that follow from d loss / d logits of these rows."""
        dh, dw, db = self.gradients
        scale = self.scale / self.lift
        if dh is not None:
            values = torch.mm(d_KV, self.weight).to(self.kind)
            if scale != 1:
                values.mul_(scale)
            if dh.is_cuda or not self.repeats:  # rows that repeat are added in an order that each device fixes
                dh.index_put_((rows,), values, accumulate=self.repeats)
            else:
                dh.index_add_(0, rows, values)
        if dw is not None and dw.dtype == d_KV.dtype:
            dw.addmm_(d_KV.T, self.hidden[rows], beta=self.beta, alpha=scale)
        elif dw is not None and dw.is_cuda:  # the matmul itself adds up in float32; torch >= 2.10 (PR 167931)
            numbers = {"beta": self.beta, "alpha": scale}
            torch.addmm(dw, d_KV.T, self.hidden[rows], out_dtype=self.kind, **numbers, out=dw)
        elif dw is not None:  # a chunk's product has the autocast dtype, the sum float32
            product = torch.mm(d_KV.T, self.hidden[rows])
            dw.add_(product, alpha=scale) if self.beta else dw.copy_(product).mul_(scale)
        if db is not None:
            db.add_(d_KV.sum(0, dtype=self.kind), alpha=scale)
        self.beta = 1.0

    # ------------------------------------------------------------------------------------------ pointwise passes

    def differentiate(
        self, x_KV: Tensor, uses: Figures, lam: Tensor, pair_weight: Tensor, mixup: Tensor, height: int
    ) -> None:
        """Turn the logits x [K, V] of a chunk into d loss / dx, in place; fill the figures and mixup.

        The first M rows are column 0 of M pairs, the next M are column 1; the rows in no pair follow.
        uses    of the K rows
        lam, pair_weight, mixup  [M]
        height  rows of a block
        """
        n_pairs = len(lam)

        def load(name: str, x: Tensor) -> Tensor:  # x itself if softmax can work in place, else a float32 copy
            return x if x.dtype == self.kind else self.spare[name][: len(x)].copy_(x)

        def store(x: Tensor, at: slice) -> None:  # the copy goes back where the logits were
            if x.dtype != x_KV.dtype and self.trains:
                x_KV[at] = x

        # pairs: rows i with their partners, rows j
        for start in range(0, n_pairs, height):
            i = slice(start, min(start + height, n_pairs))
            j = slice(n_pairs + i.start, n_pairs + i.stop)
            xi, xj, lam_R1 = load("a", x_KV[i]), load("b", x_KV[j]), lam[i, None]
            mix = torch.lerp(xj, xi, lam_R1, out=self.spare["mix"][: len(lam_R1)])
            total = self._mixup(mix, uses.label[i], uses.label[j], lam[i], mixup[i])
            scale_R1 = (pair_weight[i] / total)[:, None]
            for x, at, share in ((xi, i, lam_R1), (xj, j, 1 - lam_R1)):
                self._ntp(x, uses.part(at))
                if self.trains:
                    x.addcmul_(mix, share * scale_R1)
                store(x, at)
        # rows in no pair
        for start in range(2 * n_pairs, len(x_KV), height):
            at = slice(start, start + height)
            x = load("a", x_KV[at])
            self._ntp(x, uses.part(at))
            store(x, at)

    def _ntp(self, x: Tensor, uses: Figures) -> None:
        """Turn logits x [R, V] into d (row_weight ntp) / dx in place; fill the figures, and the weight by a rule."""
        slope = self._capped(x)
        label = uses.label[:, None]
        at_label = x.gather(1, label).squeeze(1)
        if self.stats and not x.is_cpu:
            torch.eq(x.argmax(1), uses.label, out=uses.correct)
        elif self.stats:  # argmax is slow: only for rows whose label has the maximum, 0 by now
            hits = (at_label == 0).nonzero().squeeze(1)
            uses.correct[hits] = x[hits].argmax(1) == uses.label[hits]
        # losses; x becomes exp(x), so what needs x itself is taken before
        mean = x.mean(1) if self.smoothing else None
        logits = None
        if self.rule is not None or self.entropy:  # 0 times the -inf of a masked token would be NaN
            logits = self.spare["shifted"][: len(x)].copy_(x).clamp_(min=torch.finfo(x.dtype).min)
        total = x.exp_().sum(1)
        torch.sub(total.log(), at_label, out=uses.nll)
        uses.ntp.copy_(uses.nll)
        if mean is not None:
            uses.ntp.lerp_(total.log() - mean, self.smoothing)
        if logits is not None:
            torch.sub(total.log(), torch.linalg.vecdot(x, logits) / total, out=uses.entropy)  # log sum e - sum p z
        # the weight by a rule
        if self.rule is not None:
            factor = self.rule(uses.nll.clone(), uses.entropy.clone()).detach()
            if factor.shape != uses.nll.shape:
                raise ValueError(f"the rule must return one factor per row, not shape {tuple(factor.shape)}.")
            # 0 if the use is not the row's first, whatever the rule returns
            uses.weight.copy_(torch.where(uses.weight == 0, 0.0, uses.weight * factor))
        # the gradient
        if self.trains:
            w = uses.weight[:, None]
            x.mul_(w / total[:, None])  # w (p - smoothing / V - (1 - smoothing) [v is the label]), term by term
            if self.smoothing:
                x.sub_(w * (self.smoothing / x.shape[1]))
            x.scatter_add_(1, label, w * (self.smoothing - 1))
            if slope is not None:
                x.mul_(slope)

    def _mixup(self, x: Tensor, label_i: Tensor, label_j: Tensor, lam: Tensor, loss: Tensor) -> Tensor:
        """Turn mixed logits x [R, V] into d mixup / dx times the softmax sum of each row, in place; fill `loss`.

        Return these sums [R]. The caller divides by them in a pass that it makes anyway, which saves one here.
        """
        slope = self._capped(x)
        targets = ((label_i[:, None], lam), (label_j[:, None], 1 - lam))
        at_labels = sum(share * x.gather(1, label).squeeze(1) for label, share in targets)
        total = x.exp_().sum(1)
        loss.copy_(total.log() - at_labels)
        if self.trains:
            for label, share in targets:
                x.scatter_add_(1, label, -(total * share)[:, None])  # added, as both labels may be one token
            if slope is not None:
                x.mul_(slope)
        return total

    def _capped(self, x: Tensor) -> Tensor | None:
        """Turn logits x into softcap tanh(x / softcap) less the row's maximum, in place; return the cap's slope."""
        slope = None
        if self.softcap is not None:
            x.div_(self.softcap).tanh_()
            if self.trains:
                slope = torch.mul(x, x, out=self.spare["slope"][: len(x)]).neg_().add_(1)  # 1 - tanh^2
            x.mul_(self.softcap)
        x.sub_(x.amax(1, keepdim=True))
        return slope


@cache
@torch.inference_mode(False)
def working_kernels(device: torch.device, dtype: torch.dtype, softcap: float | None) -> Any:
    """Return the Triton kernels if they give what torch gives for a small input; else None, after one warning."""
    numbers = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=numbers).to(device, dtype).requires_grad_() for n in (6, 9000))
    rows = torch.arange(6, device=device)
    lam, share = torch.rand(2, generator=numbers).to(device), torch.rand(6, generator=numbers).to(device)
    figures: list[list[Tensor]] = []
    try:
        from sftmix.functional import kernels

        labels = torch.mm(hidden, weight.T).argmax(1) // (1 + rows % 2)  # half of them are hits
        for backend in (kernels, None):
            figures.append([])
            for trains in (True, False):
                with torch.set_grad_enabled(trains):
                    one = Pass(hidden, weight, None, softcap, stats=not trains)
                one.kernels = backend
                m = 2 * trains
                pairs = rows[: 2 * m].view(m, 2), lam[:m], share, share[:m], rows[2 * m :]
                _, of_rows, mixup = one.loss(labels, *pairs, chunk_size=4)
                times = [scaled(g, lam[0], False, backend) for g in one.gradients if g is not None]
                figures[-1] += [of_rows.nll, of_rows.correct.float(), mixup, *times]
        rtol, atol = 4 * torch.finfo(dtype).eps, 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(*figures, rtol=rtol, atol=atol)
    except Exception as error:  # a compiler, a driver or a device that fails in its own way
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"the Triton kernels of the loss are left out on {device}: {reason}", stacklevel=2)
        return None
    return kernels
