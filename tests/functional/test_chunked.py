"""`chunked_loss` against plain autograd on all logits at once, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sftmix.functional import chunked_loss
from tests.functional.loss_checks import cases, close, make_case


def focal(logits, labels):
    """A weight that is differentiated, too."""
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-nll)) ** 2 * nll


def divergence(z_i, z_j, z, lam):
    q = lam[:, None] * z_i.softmax(-1) + (1 - lam[:, None]) * z_j.softmax(-1)
    return F.kl_div(z.log_softmax(-1), q, reduction="none").sum(-1)


def inputs_of(case, frozen):
    pairs, lam = case.pairs, case.lam[:, None]
    leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(not frozen)]
    leaves += [] if case.bias is None else [case.bias.clone().requires_grad_(not frozen)]
    hidden = leaves[0]
    i, j = hidden[pairs[:, 0]], hidden[pairs[:, 1]]
    return leaves, {"rows": hidden, "pairs": (i, j, lam * i + (1 - lam) * j)}


@given(cases(rules=False, smoothing=False), st.booleans(), st.booleans(), st.sampled_from([1.0, -0.5]))
def test_values_and_gradients_are_those_of_all_logits_at_once(case, frozen, weighted, upstream):
    options = {name: case.options[name] for name in ("softcap", "scale")}

    def logits(h, weight, bias):
        z = options["scale"] * F.linear(h, weight, bias)
        return z if options["softcap"] is None else options["softcap"] * torch.tanh(z / options["softcap"])

    factors = torch.linspace(0, 2, len(case.labels), dtype=torch.float64).flip(0)
    outcomes = []
    for chunked in (True, False):
        leaves, given = inputs_of(case, frozen)
        weight, bias = leaves[1], leaves[2] if len(leaves) > 2 else None
        if chunked:
            more = {**options, "bias": bias, "chunk_size": case.options["chunk_size"]}
            row_weight = factors if weighted else None
            rows = chunked_loss(given["rows"], focal, case.labels, row_weight=row_weight, weight=weight, **more)
            pairs = chunked_loss(given["pairs"], divergence, case.lam, weight=weight, **more)
            each, loss = (rows.each, pairs.each), rows.loss + pairs.loss
            assert not any(x.requires_grad for x in each)
        else:
            rows = focal(logits(given["rows"], weight, bias), case.labels)
            pairs = divergence(*(logits(h, weight, bias) for h in given["pairs"]), case.lam)
            summed = (rows * factors).sum() if weighted else rows.sum()
            each, loss = (rows.detach(), pairs.detach()), summed + pairs.sum()
        (upstream * loss).backward()
        outcomes.append((loss.detach(), *each, *(leaf.grad for leaf in leaves)))
    for found, expected in zip(*outcomes, strict=True):
        if found is not None and expected is None:
            assert not found.any()  # no row asks for it
        else:
            close(found, expected)


def test_without_gradients_and_without_rows():
    case = make_case(3)
    with torch.no_grad():
        found = chunked_loss(case.hidden, focal, case.labels, weight=case.weight)
    assert not found.loss.requires_grad
    close(found.each, focal(case.hidden @ case.weight.T, case.labels))
    hidden = case.hidden[:0].clone().requires_grad_()
    chunked_loss(hidden, focal, case.labels[:0], weight=case.weight).loss.backward()
    assert hidden.grad.shape == (0, 4)


def test_under_autocast_the_matmuls_alone_are_bf16():
    case = make_case(5, rows=40, width=16, vocabulary=50, bias=False)
    hidden, weight = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_loss(hidden, focal, case.labels, weight=weight, chunk_size=7)
    found.loss.backward()
    assert (found.each.dtype, hidden.grad.dtype) == (torch.float32, torch.float32)
    expected = focal((hidden.bfloat16() @ weight.bfloat16().T).float(), case.labels)
    torch.testing.assert_close(found.each, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("f", "columns", "words"),
    [
        (focal, (torch.zeros(3, dtype=torch.int64),), r"the same number of rows, not \[3, 9\]"),
        (lambda z: z, (), r"f must return one loss per row, 9, not \(9, 7\)"),
    ],
)
def test_what_does_not_fit_is_refused(f, columns, words):
    case = make_case(1)
    with pytest.raises(ValueError, match=words):
        chunked_loss(case.hidden, f, *columns, weight=case.weight)


@pytest.mark.parametrize("name", ["row_weight", "column 0"])
def test_a_constant_that_asks_for_a_gradient_is_refused(name):
    """It would get none; a further `hidden` gets its own, and without grad mode nothing is asked for."""
    case = make_case(1)
    learnt = case.row_weight.clone().requires_grad_()
    columns, words = ((), {"row_weight": learnt}) if name == "row_weight" else ((learnt,), {})

    def loss():
        return chunked_loss(case.hidden, lambda z, *x: z.logsumexp(1), *columns, weight=case.weight, **words)

    with pytest.raises(ValueError, match=f"{name} would get no gradient: .*; detach them"):
        loss()
    with torch.no_grad():
        assert loss().loss.isfinite()
    again = case.hidden.clone().requires_grad_()
    found = chunked_loss((case.hidden, again), lambda a, b: a.logsumexp(1) * b.logsumexp(1), weight=case.weight)
    found.loss.backward()
    assert again.grad.any()


def entropy(logits):
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def mean_logit(logits):
    """Of the first five, with shares of which that of the masked one is 0."""
    return logits[:, :5] @ logits.new_tensor([0.5, 0.2, 0.0, 0.2, 0.1])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("f", [entropy, mean_logit])
def test_a_masked_token_is_as_if_it_were_not_there(f, softcap):
    """Its bias is -inf, and 0 times that would be NaN."""
    case, kept = make_case(16, vocabulary=50), [*range(2), *range(3, 50)]
    hidden, bias = case.hidden.clone().requires_grad_(), case.bias.clone()
    bias[2] = -torch.inf
    found = chunked_loss(hidden, f, weight=case.weight, bias=bias, softcap=softcap)
    found.loss.backward()
    if softcap is None:
        plain = case.hidden.clone().requires_grad_()
        z = F.linear(plain, case.weight[kept], bias[kept])
        expected = entropy(z) if f is entropy else z[:, :4] @ z.new_tensor([0.5, 0.2, 0.2, 0.1])
        expected.sum().backward()
        close(found.each, expected.detach())
        close(hidden.grad, plain.grad)
    assert found.each.isfinite().all()
    assert hidden.grad.isfinite().all()
