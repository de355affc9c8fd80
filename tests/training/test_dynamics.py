"""Where the reference is scored."""

import numpy as np
import pytest

from sftmix.common.errors import ConfigError, NonFiniteError
from sftmix.components import Perplexity
from sftmix.training.dynamics import checkpoint_steps, merge, one_checkpoint
from sftmix.types import RowScores, TrainingDynamics


@pytest.mark.parametrize(
    ("checkpoints", "total", "steps"),
    [
        (5, 100, [20, 40, 60, 80, 100]),
        (5, 13, [3, 5, 8, 10, 13]),
        (5, 3, [1, 2, 3]),
        ([0, 0.5, 1], 10, [0, 5, 10]),
        ([0.01, 0.5, 1], 20, [1, 10, 20]),
        ([0, 0.01, 0.02, 1], 20, [0, 1, 20]),
        ([0, 3, 7], 10, [0, 3, 7]),
    ],
)
def test_checkpoint_steps(checkpoints, total, steps):
    assert checkpoint_steps(checkpoints, total) == steps


@pytest.mark.parametrize("checkpoints", [[5, 11], [0.5, 3]])
def test_checkpoints_that_do_not_exist(checkpoints):
    with pytest.raises(ConfigError, match=r"reference\.checkpoints names step"):
        checkpoint_steps(checkpoints, 10)


def test_merge_puts_checkpoints_side_by_side_and_of_joins_by_id():
    def one(step):
        nll = np.array([[1.0], [2.0]]) * step
        tokens = [np.full((1, 2), step, np.float32), np.full((1, 3), -step, np.float32)]
        return TrainingDynamics(["a", "b"], np.array([step]), nll, np.array([2, 3]), np.array([[1], [2]]), tokens)

    both = merge([one(4), one(8)])
    assert both.steps.tolist() == [4, 8]
    assert both.nll_sum.tolist() == [[4.0, 8.0], [8.0, 16.0]]
    assert both.token_nll[1].tolist() == [[-4.0] * 3, [-8.0] * 3]

    joined = both.of(["b", "x", "a"])
    assert joined.n_tokens.tolist() == [3, 0, 2]
    assert joined.nll_sum[[0, 2]].tolist() == [[8.0, 16.0], [4.0, 8.0]]
    assert joined.scored.tolist() == [True, False, True]
    assert joined.token_nll[1].shape == (2, 0)


def scores_with(worst: float) -> RowScores:
    """The losses of three examples of two tokens, of which the second has this NLL."""
    tokens = [np.full(2, nll / 2, np.float32) for nll in (4.0, worst, 6.0)]
    return RowScores(np.array([4.0, worst, 6.0]), np.full(3, 2), np.ones(3, np.int64), tokens)


@pytest.mark.parametrize("worst", [np.nan, np.inf, 1420.0])
def test_an_example_without_a_finite_perplexity_at_any_checkpoint_is_excluded(worst):
    """exp(1420 / 2) is beyond float64, and exp(1418 / 2) is not."""
    merged = merge([one_checkpoint(["a", "b", "c"], step, scores_with(worst if step == 2 else 1.0)) for step in (1, 2)])
    assert merged.scored.tolist() == [True, False, True]
    assert merged.nll_sum.tolist() == [[4.0, 4.0], [0.0, 0.0], [6.0, 6.0]]
    assert [np.shape(nll) for nll in merged.token_nll] == [(2, 2), (2, 0), (2, 2)]
    np.testing.assert_allclose(Perplexity().estimate(merged), [-np.exp(2.0), np.nan, -np.exp(3.0)], rtol=1e-14)
    assert one_checkpoint(["a", "b", "c"], 1, scores_with(1418.0)).scored.all()


def test_a_model_without_any_finite_perplexity_is_broken():
    with pytest.raises(
        NonFiniteError,
        match="none of 2 examples has a finite perplexity: the model is broken, or its training diverged",
    ):
        one_checkpoint(["a", "b"], 1, RowScores(np.array([np.nan, np.inf]), np.full(2, 2), np.ones(2, np.int64)))
