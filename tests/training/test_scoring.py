"""Scoring against a loop over `model(...).logits`, one example at a time, in float64 (T24, T26, T27, T29)."""

import numpy as np
import pytest
import torch
from torch import nn

from sftmix.common.errors import NonFiniteError
from sftmix.common.world import World
from sftmix.training import scoring
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import wrap
from sftmix.training.scoring import Scorer, held_out_metrics
from tests.forked import on_ranks
from tests.toy import ToyRows, own_logits, own_nll, toy_model, toy_rows

# Neither sorted by length nor by its reverse; of very different lengths, and one response of a single token.
DATA = toy_rows([(3, 5), (60, 40), (1, 1), (2, 90), (30, 2), (5, 5), (1, 20), (80, 1), (3, 3), (10, 30), (2, 1)])


def by_hand(model: nn.Module, data: ToyRows) -> list[tuple[float, int, int, np.ndarray]]:
    """(NLL sum, response tokens, correct tokens, NLL of each) of every row."""
    correct = [int((z.argmax(axis=1) == y).sum()) for z, y in own_logits(model.eval(), data)]
    return [(nll.sum(), len(nll), hits, nll) for nll, hits in zip(own_nll(model, data), correct, strict=True)]


def assert_scores(scores, expected, *, tolerance: float) -> None:
    assert scores.n_tokens.tolist() == [n for _, n, _, _ in expected]
    assert scores.n_correct.tolist() == [c for _, _, c, _ in expected]
    assert scores.nll_sum.dtype == np.float64
    np.testing.assert_allclose(scores.nll_sum, [nll for nll, *_ in expected], rtol=tolerance)
    if scores.token_nll is not None:
        for ours, (_, _, _, theirs) in zip(scores.token_nll, expected, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    """Padded tokens per scoring batch so few that there are five batches, an odd number."""
    monkeypatch.setattr(scoring, "SCORING_TOKENS", 128)


@pytest.mark.parametrize("tied", [False, True])
def test_the_sums_are_those_of_the_models_own_logits(tied):
    model = toy_model(tied=tied)
    scores = Scorer(world=World(), token_nll=True)(TrainingModule(model), DATA)
    assert_scores(scores, by_hand(model, DATA), tolerance=1e-12)
    assert scores.n_correct.sum() > 0


def test_float32_is_float32(several_batches):
    model = toy_model(dtype=torch.float32)
    scores = Scorer(world=World())(TrainingModule(model), DATA)
    assert_scores(scores, by_hand(model, DATA), tolerance=2e-6)
    assert scores.token_nll is None


def test_dropout_is_off_while_scoring_and_on_again_after():
    """T27: a model in training mode is scored in eval mode; the random state of training is not touched."""
    model = toy_model(dropout=0.5)
    expected = by_hand(model, DATA)
    module = TrainingModule(model).train()
    before = torch.get_rng_state()
    assert_scores(Scorer(world=World())(module, DATA), expected, tolerance=1e-12)
    assert all(m.training for m in module.modules())
    assert torch.equal(torch.get_rng_state(), before)
    module.eval()
    Scorer(world=World())(module, DATA)
    assert not any(m.training for m in module.modules())


def test_scoring_does_no_gradient_work():
    """T29: nothing is kept for a backward (nor allocated for one: tests/functional), and no weight gets a gradient."""
    model = toy_model()

    def kept(tensor):
        raise AssertionError("kept for a backward")

    with torch.autograd.graph.saved_tensors_hooks(kept, kept):
        with pytest.raises(AssertionError, match="kept for a backward"):
            model(input_ids=torch.arange(3)[None])
        Scorer(world=World())(TrainingModule(model), DATA)
    assert all(p.grad is None for p in model.parameters())


def test_a_broken_model_is_not_scored():
    """T10: no NaN becomes a perplexity."""
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="11 examples have no finite NLL"):
        held_out_metrics(Scorer(world=World())(TrainingModule(model), DATA))


def score_all_ways(world: World) -> None:
    """Five batches on two ranks, and one: a rank has nothing of its own."""
    one = Scorer(world=World(), token_nll=True)(TrainingModule(toy_model()), DATA)
    for parallel in ("ddp", "fsdp"):
        for scoring.SCORING_TOKENS in (128, 100000):
            module = wrap(TrainingModule(toy_model()), parallel=parallel, precision="fp32", world=world)
            two = Scorer(world=world, token_nll=True)(module, DATA)
            np.testing.assert_allclose(two.nll_sum, one.nll_sum, rtol=1e-12)
            assert two.n_tokens.tolist() == one.n_tokens.tolist()
            assert two.n_correct.tolist() == one.n_correct.tolist()
            np.testing.assert_allclose(np.concatenate(two.token_nll), np.concatenate(one.token_nll), rtol=1e-6)


def test_two_ranks_give_the_table_of_one():
    """T24: nothing is counted twice, whatever the rank."""
    on_ranks(score_all_ways)
