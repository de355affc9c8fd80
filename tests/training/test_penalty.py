"""The confidence penalty, against the entropy of torch.distributions in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sftmix.components import NTP, ConfidencePenalty
from sftmix.testing import check_objective
from tests.toy import toy_model
from tests.training.test_step import one_step
from tests.training.test_unigram import CUTS, OF_HEAD, check_cut, check_head, head_with


def penalised(z: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    nll = F.cross_entropy(z, labels, reduction="none")
    return nll - beta * torch.distributions.Categorical(logits=z).entropy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_global_batch_cut_up_is_the_formula(tied, cut):
    check_cut(ConfidencePenalty(beta=0.3), lambda z, labels: penalised(z, labels, 0.3), tied=tied, cut=cut)


@given(**OF_HEAD, beta=st.floats(0.01, 5.0), seed=st.integers(0, 9))
def test_every_head_has_the_formula_and_its_gradients(beta, seed, **of_head):
    """Also of a prediction that is sure, whose small probabilities are 0 times a large logarithm."""
    torch.manual_seed(seed)
    check_head(ConfidencePenalty(beta=beta), lambda z, labels: penalised(z, labels, beta), head_with(**of_head))


def test_without_a_weight_it_is_ntp_to_the_bit_and_with_one_the_logged_nll_stays():
    made, logged = [], []
    for objective in (NTP(), ConfidencePenalty(beta=0), ConfidencePenalty(beta=0.5)):
        model = toy_model(dtype=torch.float32)
        done = one_step(model, objective, rate=0.125)
        made.append([torch.tensor(done.loss), *(p.detach() for p in model.parameters())])
        logged.append(done.ntp)
    assert all(map(torch.equal, made[0], made[1]))
    assert made[2][0] < made[0][0]
    assert logged[0] == logged[1] == logged[2]


def test_it_is_an_objective():
    check_objective(ConfidencePenalty(beta=0.5))
