"""What any implementation of the SFTMix loss must satisfy: the shipped one passes, the mutants do not.

Every check takes the implementation as its first argument and a random case as its second, and computes what it expects
by formulas of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sftmix.functional import SFTLoss, reference_sft_loss, sft_loss

Loss = Callable[..., SFTLoss]
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Case:
    """Inputs of one call, float64."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    pairs: Tensor
    lam: Tensor
    row_weight: Tensor
    pair_weight: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, loss, *, frozen=False, **options):
        hidden = self.hidden.clone().requires_grad_()
        weight = self.weight.clone().requires_grad_(not frozen)
        bias = None if self.bias is None else self.bias.clone().requires_grad_(not frozen)
        result = call(self, hidden, weight, loss=loss, bias=bias, **self.options | {"stats": True} | options)
        result.loss.backward()
        return Outcome(result, hidden.grad, weight.grad, None if bias is None else bias.grad)

    def with_pairs_only(self):
        return replace(self, row_weight=torch.zeros(len(self.labels), dtype=torch.float64))

    def without_pairs(self, row_weight):
        none = self.pairs[:0]
        return replace(self, pairs=none, lam=self.lam[:0], pair_weight=self.pair_weight[:0], row_weight=row_weight)


@dataclass(frozen=True)
class Outcome:
    result: SFTLoss
    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None


def close(got, expected, tolerance=TOLERANCE):
    if got is None or expected is None:
        assert got is expected
        return
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def same(a, b):
    for name in SFTLoss._fields:
        close(getattr(a.result, name), getattr(b.result, name))
    close(a.hidden, b.hidden)
    close(a.weight, b.weight)
    close(a.bias, b.bias)


def make_case(seed, *, rows=9, pairs=6, width=4, vocabulary=7, bias=True, **options):
    """A generic case; pairs repeat rows, and may pair a row with itself."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    many = pairs if rows else 0
    return Case(
        hidden=normal(rows, width),
        weight=normal(vocabulary, width),
        labels=torch.randint(0, vocabulary, (rows,), generator=g),
        pairs=torch.randint(0, max(rows, 1), (many, 2), generator=g),
        lam=torch.rand(many, generator=g, dtype=torch.float64),
        row_weight=torch.rand(rows, generator=g, dtype=torch.float64) + 0.1,
        pair_weight=torch.rand(many, generator=g, dtype=torch.float64) + 0.1,
        bias=normal(vocabulary) if bias else None,
        options=options,
    )


def call(case, hidden, weight, *, loss=sft_loss, **options):
    """A loss, the shipped one, of other states and head."""
    return loss(
        hidden,
        weight,
        case.labels,
        case.pairs,
        case.lam,
        **{"row_weight": case.row_weight, "pair_weight": case.pair_weight, "bias": case.bias} | options,
    )


def dft(nll, entropy):
    return torch.exp(-nll)


def by_entropy(nll, entropy):
    return 1 + entropy - 0.1 * nll


@st.composite
def cases(draw, *, softcap=True, rules=True, smoothing=True):
    """Random sizes, repeats, options and chunk sizes; lambda exactly 0 or 1 now and then."""
    options = {
        "softcap": draw(st.sampled_from([None, 1.5, 30.0])) if softcap else None,
        "scale": draw(st.sampled_from([1.0, 0.25, -1.5])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])) if smoothing else 0.0,
        "chunk_size": draw(st.sampled_from([None, 1, 2, 3, 4, 7])),
        "rule": draw(st.sampled_from([None, None, dft, by_entropy])) if rules else None,
    }
    case = make_case(
        draw(st.integers(0, 2**32)),
        rows=draw(st.integers(0, 12)),
        pairs=draw(st.integers(0, 9)),
        width=draw(st.integers(1, 5)),
        vocabulary=draw(st.integers(1, 9)),
        bias=draw(st.booleans()),
        **options,
    )
    lam = case.lam.clone()
    for m in draw(st.sets(st.integers(0, 8))):
        lam[m : m + 1] = float(m % 2)
    return replace(case, lam=lam)


# -------------------------------------------------------------------------------------------------- checks


def check_reference(loss, case):
    """Values and every gradient are those of the formula written naively; a frozen head gets none."""
    same(case.run(loss), case.run(reference_sft_loss))
    same(case.run(loss, frozen=True), case.run(reference_sft_loss, frozen=True))


def check_sum(loss, case):
    """loss = sum_t row_weight_t nll_t + sum_m pair_weight_m mixup_m, whatever the chunks."""
    case = replace(case, options=case.options | {"label_smoothing": 0.0})
    out = case.run(loss).result
    w, rule = case.row_weight, case.options.get("rule")
    w = w if rule is None else w * rule(out.nll, torch.special.entr(predictions(case)).sum(1))
    close(out.loss.detach(), (w * out.nll).sum() + (case.pair_weight * out.mixup).sum())


def check_endpoints(loss, case):
    """lambda = 1 is the NTP loss of column 0, lambda = 0 that of column 1; in value and gradient."""
    case = replace(case.with_pairs_only(), options=case.options | {"label_smoothing": 0.0, "rule": None})
    for column, lam in ((0, 1.0), (1, 0.0)):
        out = replace(case, lam=torch.full_like(case.lam, lam)).run(loss)
        close(out.result.mixup, out.result.nll[case.pairs[:, column]])
        weight = torch.zeros(len(case.labels), dtype=torch.float64)
        weight.index_add_(0, case.pairs[:, column], case.pair_weight)
        ntp = case.without_pairs(weight).run(loss)
        close(out.result.loss.detach(), ntp.result.loss.detach())
        close(out.hidden, ntp.hidden)
        close(out.weight, ntp.weight)


def check_swap(loss, case):
    """(i, j, lambda) and (j, i, 1 - lambda) are the same pair."""
    same(case.run(loss), replace(case, pairs=case.pairs.flip(1), lam=1 - case.lam).run(loss))


def check_chunk_size(loss, case):
    """The chunk size changes nothing."""
    expected = case.run(loss, chunk_size=1000)
    for size in (1, 2, 3, 5, 8):
        same(case.run(loss, chunk_size=size), expected)


def check_permutation(loss, case):
    """The order of the rows and of the pairs changes nothing."""
    rows = torch.randperm(len(case.labels), generator=torch.Generator().manual_seed(1))
    order = torch.randperm(len(case.lam), generator=torch.Generator().manual_seed(2))
    place = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows)))
    moved = replace(
        case,
        hidden=case.hidden[rows],
        labels=case.labels[rows],
        pairs=place[case.pairs[order]],
        lam=case.lam[order],
        pair_weight=case.pair_weight[order],
        row_weight=case.row_weight[rows],
    )
    a, b = case.run(loss), moved.run(loss)
    close(b.result.loss, a.result.loss)
    close(b.result.nll, a.result.nll[rows])
    close(b.result.mixup, a.result.mixup[order])
    close(b.hidden, a.hidden[rows])
    close(b.weight, a.weight)


def predictions(case):
    """p [T, V]"""
    logits = case.options.get("scale", 1.0) * (case.hidden @ case.weight.T + (0 if case.bias is None else case.bias))
    cap = case.options.get("softcap")
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return torch.exp(logits - torch.logsumexp(logits, 1, keepdim=True))


def mixture(case):
    """p~ [M, V] by its other formula, the normalised geometric mixture p_i^lambda p_j^(1 - lambda); no soft-cap."""
    p = predictions(case)
    i, j = case.pairs.unbind(1)
    q = p[i] ** case.lam[:, None] * p[j] ** (1 - case.lam[:, None])
    return q / q.sum(1, keepdim=True)


def check_mixture(loss, case):
    """The prediction p~, recovered label by label from the losses, is the geometric mixture, on the simplex."""
    case = replace(case, options=case.options | {"softcap": None})
    columns = []
    for v in range(len(case.weight)):
        out = replace(case, labels=torch.full_like(case.labels, v)).run(loss)
        columns.append(torch.exp(-out.result.mixup))
    p = torch.stack(columns, 1)
    assert bool((p >= 0).all())
    close(p.sum(1), torch.ones(len(p), dtype=torch.float64))
    close(p, mixture(case))


def check_label(loss, case):
    """The label Y~, recovered from the gradient of the bias (p~ - Y~), has lambda at y_i and 1 - lambda at y_j."""
    bias = torch.zeros(len(case.weight), dtype=torch.float64)
    case = replace(case.with_pairs_only(), bias=bias, options={})
    for m in range(len(case.lam)):
        pair = {"pairs": case.pairs[m : m + 1], "lam": case.lam[m : m + 1], "pair_weight": torch.ones_like(bias[:1])}
        one = replace(case, **pair)
        expected = torch.zeros_like(bias).index_add(0, case.labels[one.pairs[0]], torch.cat([one.lam, 1 - one.lam]))
        close(mixture(one)[0] - one.run(loss).bias, expected)


def check_appendix_a(loss, case):
    """Appendix A for one pair: the closed forms of the gradients of Mixup, of its decomposed version, and of their
    difference, W^T (p~ - lambda p_c - (1 - lambda) p_u) by the input.

    Decomposed: lambda CE_c + (1 - lambda) CE_u, that is NTP with the rows weighted by lambda and 1 - lambda.
    """
    if len(case.labels) < 2 or not len(case.lam):
        return
    w, lam, pairs, one = case.weight, case.lam[:1], torch.tensor([[0, 1]]), torch.ones(1, dtype=torch.float64)
    pair = Case(case.hidden[:2], w, case.labels[:2], pairs, lam, None, one)
    share = torch.cat([lam, 1 - lam])
    mixed, decomposed = pair.with_pairs_only().run(loss), pair.without_pairs(share).run(loss)
    each = torch.softmax(pair.hidden @ w.T, 1)
    labels = torch.eye(len(w), dtype=torch.float64)[pair.labels]
    z = share @ pair.hidden
    p, y = torch.softmax(w @ z, 0), share @ labels
    close(mixed.hidden.sum(0), w.T @ (p - y))
    close((mixed.hidden - decomposed.hidden).sum(0), w.T @ (p - share @ each))
    close(mixed.hidden, torch.outer(share, w.T @ (p - y)))
    close(decomposed.hidden, share[:, None] * ((each - labels) @ w))
    close(mixed.weight, torch.outer(p - y, z))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
