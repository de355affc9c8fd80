"""Property tests of the shipped loss: the checks of loss_checks on random cases, and Appendix A at fixed points."""

import pytest
import torch
from hypothesis import given, settings

from sftmix.functional import reference_sft_loss, sft_loss
from tests.functional.loss_checks import CHECKS, appendix_a, cases, close, make_case, one_pair


@pytest.mark.parametrize("name", CHECKS)
@settings(max_examples=40)
@given(case=cases())
def test_fused(name, case):
    CHECKS[name](sft_loss, case)


@pytest.mark.parametrize("name", [n for n in CHECKS if n != "reference"])
@settings(max_examples=10)
@given(case=cases())
def test_specification(name, case):
    CHECKS[name](reference_sft_loss, case)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": 0.5, "label_smoothing": 0.1, "chunk_size": 3}])
def test_gradcheck(options):
    case = make_case(3, rows=5, pairs=4)
    assert case.bias is not None

    def loss(h, w, b):
        weights = {"row_weight": case.row_weight, "pair_weight": case.pair_weight}
        return sft_loss(h, w, case.labels, case.pairs, case.lam, **weights, bias=b, **options).loss

    inputs = tuple(x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias))
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


# ------------------------------------------------------------------------------------------- Appendix A

HIDDEN = torch.tensor([[2.0, -1.0, 0.5], [-0.5, 1.5, 1.0]], dtype=torch.float64)
WEIGHT = torch.tensor([[1.0, 0.2, -0.3], [-0.4, 1.1, 0.6], [0.3, -0.8, 0.9], [0.7, 0.5, -1.2]], dtype=torch.float64)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_mixup_decomposes_at_the_endpoints(lam):
    for mixed, decomposed in appendix_a(sft_loss, one_pair(HIDDEN, WEIGHT, [0, 2], lam)).values():
        close(mixed, decomposed)


def test_mixup_decomposes_where_logits_differ_by_a_constant():
    weight = WEIGHT.clone()
    weight[:, 0] = 1.0  # so that moving along the first axis adds a constant to all logits
    hidden = HIDDEN[:1].repeat(2, 1)
    hidden[1, 0] += 1.7
    same_label = appendix_a(sft_loss, one_pair(hidden, weight, [2, 2], 0.3))
    for mixed, decomposed in same_label.values():
        close(mixed, decomposed)
    other_label = appendix_a(sft_loss, one_pair(hidden, weight, [0, 2], 0.3))
    close(*other_label["input"])
    for name in ("confident", "unconfident", "weight"):  # their label part does not decompose
        mixed, decomposed = other_label[name]
        assert float((mixed - decomposed).norm()) > 0.05


@pytest.mark.parametrize("lam", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("vocabulary", [3, 4])
@pytest.mark.parametrize("labels", [[0, 2], [1, 1]])
def test_mixup_does_not_decompose_at_generic_witnesses(lam, vocabulary, labels):
    gradients = appendix_a(sft_loss, one_pair(HIDDEN, WEIGHT[:vocabulary], labels, lam))
    for mixed, decomposed in gradients.values():
        assert float((mixed - decomposed).norm()) > 0.005
