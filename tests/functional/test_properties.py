"""Property tests of the shipped loss and of the specification: the checks of loss_checks on random cases."""

import pytest
import torch
from hypothesis import given, settings

from sftmix.functional import reference_sft_loss, sft_loss
from tests.fast import some_fast
from tests.functional.loss_checks import CHECKS, cases, make_case


@pytest.mark.parametrize("name", some_fast(CHECKS, every=2))
@settings(max_examples=40)
@given(case=cases())
def test_fused(name, case):
    CHECKS[name](sft_loss, case)


@pytest.mark.parametrize("name", [n for n in CHECKS if n not in ("reference", "chunk_size")])
@settings(max_examples=10)
@given(case=cases())
def test_specification(name, case):
    """It takes a chunk size, and has no chunks."""
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
