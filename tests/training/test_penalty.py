"""The confidence penalty, against the entropy of torch.distributions in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sftmix.components import NTP, ConfidencePenalty, LossView
from sftmix.testing import check_objective
from tests.toy import toy_model
from tests.training.test_step import DATA, UNITS, Exact, assert_same, one_step, ours, response, value_and_gradients
from tests.training.test_unigram import BATCH, CUTS, TRAINED, head_with


def penalised(z: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    nll = F.cross_entropy(z, labels, reduction="none")
    return nll - beta * torch.distributions.Categorical(logits=z).entropy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_global_batch_cut_up_is_the_formula(tied, cut):
    model = toy_model(tied=tied)
    found = ours(model, Exact(objective=ConfidencePenalty(beta=0.3), seen={}), UNITS, **cut)
    losses = []
    for row in TRAINED:
        hidden, labels, _ = response(model, DATA[row])
        losses.append(penalised(hidden @ model.get_output_embeddings().weight.T, labels, 0.3))
    assert_same(found, value_and_gradients(model, torch.cat(losses).mean()))


@given(
    bias=st.booleans(),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    scale=st.sampled_from([1.0, 0.25, 40.0]),
    adapted=st.booleans(),
    beta=st.floats(0.01, 5.0),
    seed=st.integers(0, 9),
)
def test_every_head_has_the_formula_and_its_gradients(beta, seed, **of_head):
    """Also of a prediction that is sure, whose small probabilities are 0 times a large logarithm."""
    torch.manual_seed(seed)
    head = head_with(**of_head)
    hidden = torch.randn(len(BATCH.labels), 16, dtype=torch.float64, requires_grad=True)
    objective = ConfidencePenalty(beta=beta)
    plan = objective.plan(BATCH)
    plan = replace(plan, row_weight=plan.row_weight.double())  # as a step divides it
    each = penalised(head.logits(hidden), BATCH.labels, beta)
    inputs = [hidden, *(p for p in head.module.parameters() if p.requires_grad)]
    both = objective.loss(LossView(head, lambda: hidden), BATCH, plan).loss, (plan.row_weight * each).sum()
    found, expected = ([loss.detach(), *torch.autograd.grad(loss, inputs)] for loss in both)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


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
