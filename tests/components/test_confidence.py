"""Confidence estimators against plain-Python formulas."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
from hypothesis import example, given

from sftmix.components import (
    IFD,
    Correctness,
    LearningPercentage,
    LogPerplexity,
    LowVariability,
    Need,
    Perplexity,
    variability,
)
from sftmix.components.confidence import LEAST
from sftmix.components.contracts import check_confidence
from sftmix.testing import training_dynamics
from sftmix.types import NOT_COUNTED, TrainingDynamics
from sftmix.words.errors import ConfigError


def dynamics(nll_sum, n_tokens, **more):
    nll_NC = np.asarray(nll_sum, dtype=np.float64)
    return TrainingDynamics(
        ids=[f"e{i}" for i in range(len(n_tokens))],
        steps=np.arange(nll_NC.shape[1]),
        nll_sum=nll_NC,
        n_tokens=np.asarray(n_tokens, dtype=np.int64),
        **{"n_correct": np.zeros(nll_NC.shape, dtype=np.int64), **more},
    )


@given(training_dynamics())
def test_values_are_the_definitions(drawn):
    estimators = (Perplexity(), LogPerplexity(), Correctness())
    estimates = [estimator.estimate(drawn) for estimator in estimators] + [variability(drawn)]
    table = (drawn.nll_sum.tolist(), drawn.n_correct.tolist(), drawn.n_tokens.tolist())
    for row, correct, count, conf, log_conf, share, spread in zip(*table, *estimates, strict=True):
        if count == 0:
            assert all(map(math.isnan, (conf, log_conf, share, spread)))
            continue
        perplexities = [math.exp(nll / count) for nll in row]
        assert conf == pytest.approx(-math.fsum(perplexities) / len(row), rel=1e-12)
        assert log_conf == pytest.approx(-math.fsum(row) / count / len(row), rel=1e-12, abs=1e-15)
        assert share == pytest.approx(math.fsum(correct) / (count * len(row)))
        assert spread == pytest.approx(statistics.pstdev(perplexities), rel=1e-6, abs=1e-9 * max(perplexities))


def test_an_overflowing_perplexity_ranks_last_and_has_infinite_spread():
    given_ = dynamics([[710.0, 1.0], [708.0, 709.0], [1.0, 1.0]], [1, 1, 1])
    confidence = Perplexity().estimate(given_)
    assert confidence[0] == LEAST
    assert np.argsort(-confidence).tolist() == [2, 1, 0]
    assert variability(given_)[0] == np.inf
    assert np.isfinite(LogPerplexity().estimate(given_)).all()


def test_low_variability_ranks_what_did_not_change_first():
    given_ = dynamics([[9.0, 9.0], [1.0, 2.0], [0.0, 0.0], [1.0, 6.0]], [3, 1, 0, 2])
    found = LowVariability().estimate(given_)
    assert found[0] == 0
    assert found[1] == pytest.approx(-(math.e**2 - math.e) / 2)
    assert math.isnan(found[2])
    assert np.argsort(-found)[:3].tolist() == [0, 1, 3]
    assert LowVariability().estimate(dynamics([[1.0, 500.0], [1.0, 2.0]], [1, 1]))[0] == LEAST  # its square overflows
    with pytest.raises(ConfigError, match=r"at least 2 checkpoints.*--reference\.checkpoints"):
        LowVariability().estimate(dynamics([[1.0]], [1]))


AFTER = [[6.0, 2.0, 1.0], [4.0, 4.0, 5.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
ALONE = [[8.0, 8.0, 4.0], [4.0, 2.0, 4.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ("first", [-0.75, -1, np.nan, -1]),
        ("last", [-0.25, -1.25, np.nan, 0]),
        ("mean", [-5 / 12, -17 / 12, np.nan, LEAST]),
    ],
)
def test_ifd_is_the_ratio_with_and_without_the_instruction(checkpoint, expected):
    given_ = dynamics(AFTER, [4, 2, 0, 1], alone_nll_sum=np.asarray(ALONE))
    found = IFD(checkpoint=checkpoint).estimate(given_)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert IFD.needs == {Need.RESPONSE_ALONE}


def test_ifd_needs_responses_scored_alone():
    with pytest.raises(ConfigError, match=r"--reference\.response_alone true"):
        IFD().estimate(dynamics([[1.0]], [1]))


@given(training_dynamics())
@example(dynamics([[5e-17, 0.0, 0.0]], [1]))
def test_learning_percentage_is_the_share_learned_first(drawn):
    table = (drawn.nll_sum.tolist(), drawn.n_tokens.tolist(), LearningPercentage().estimate(drawn))
    for row, count, value in zip(*table, strict=True):
        if count == 0:
            assert math.isnan(value)
            continue
        nats = [nll / count for nll in row]
        before, first, last = map(math.exp, nats)
        if nats[-1] >= nats[0]:  # of the logarithms: two that differ may have the same exponential
            assert value == LEAST
        elif (before - last) / before > 1e-6:
            assert value == pytest.approx((before - first) / (before - last), rel=1e-7, abs=1e-9)


def test_learning_percentage_survives_a_perplexity_beyond_float64():
    given_ = dynamics([[2000.0, 1.0, 0.5], [2000.0, 1999.0, 0.5], [1.0, 2000.0, 0.5]], [1, 1, 1])
    np.testing.assert_allclose(LearningPercentage().estimate(given_), [1.0, 1 - math.exp(-1), LEAST], rtol=1e-12)


@pytest.mark.parametrize("steps", [[1, 2, 3], [0, 5]])
def test_learning_percentage_needs_the_model_before_training(steps):
    given_ = dataclasses.replace(dynamics([[1.0] * len(steps)], [1]), steps=np.asarray(steps))
    with pytest.raises(ConfigError, match=r"use --reference\.checkpoints \[0, 0\.33, 1\].*of the steps \[[0-9, ]*\]"):
        LearningPercentage().estimate(given_)


def test_correctness_of_online_losses_is_refused():
    """They come without a count of correct tokens, which must not pass for one."""
    uncounted = dynamics([[1.0], [2.0]], [1, 2], n_correct=np.full((2, 1), NOT_COUNTED))
    with pytest.raises(ConfigError, match="online losses"):
        Correctness().estimate(uncounted)


@pytest.mark.parametrize("values", [[-1.0, -2.0], [np.nan, np.nan], [np.inf, np.nan]])
def test_a_confidence_is_a_number_where_and_only_where_there_are_losses(values):
    seen = dynamics([[2.0], [0.0]], [2, 0])
    with pytest.raises(ConfigError, match="allowed: a finite number for each example that was scored, NaN for each"):
        check_confidence(Perplexity(), values, seen)
