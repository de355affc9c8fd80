"""Calibration against the definitions, computed from the model's own logits, one example at a time, in float64."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from torch import nn

from sftmix.components.base import Delivered
from sftmix.components.others.calibration import (
    TAUS,
    Calibration,
    fitted_temperature,
    reliability,
    temperature_scaling,
    token_statistics,
)
from sftmix.disk.files import read_json
from sftmix.functional import fused
from sftmix.measure.delivered import deliver
from sftmix.model.head import Head
from sftmix.ranks.rng import stable_hash
from sftmix.training import scoring
from sftmix.training.module import TrainingModule
from sftmix.training.scoring import held_out_metrics
from sftmix.words.errors import NonFiniteError
from tests.toy import VOCABULARY, own_logits, toy_model, toy_rows, toy_stage

DATA = toy_rows([(3, 5), (60, 40), (1, 1), (2, 90), (30, 2), (5, 5), (1, 20), (80, 1), (3, 3), (10, 30), (2, 1)])


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    monkeypatch.setattr(scoring, "CPU_SCORING_TOKENS", 128)


@pytest.fixture(scope="module")
def logits() -> list[tuple[np.ndarray, np.ndarray]]:
    """(logits [T, V], labels [T]) of every row, by the model itself."""
    return own_logits(toy_model().eval(), DATA)


def probabilities(z: np.ndarray, tau: float = 1.0) -> np.ndarray:
    return softmax(z / tau, axis=1)


def nll(part, tau: float = 1.0) -> float:
    return float(sum(-log_softmax(z / tau, axis=1)[np.arange(len(y)), y].sum() for z, y in part))


def finest(part) -> float:
    """The best temperature by search in the exact NLL."""
    found = minimize_scalar(lambda tau: nll(part, tau), bounds=(0.25, 8), method="bounded", options={"xatol": 1e-6})
    return float(found.x)


# ------------------------------------------------------------------------------------------ one pass


def measured(model, place) -> Delivered:
    stage = toy_stage(place, [[]], eval_data=DATA, data=toy_rows([]), callbacks=[Calibration()])
    return deliver(stage, TrainingModule(model), figures={"steps": 1}, last={})


def test_every_figure_is_that_of_the_models_own_logits(logits, tmp_path):
    found = measured(toy_model(), tmp_path)
    scores, brier_sum, told = found.scores, found.scores.kept["brier_sum"], found.files["calibration.json"]
    assert read_json(tmp_path / "calibration.json") == told
    assert found.figures == {"calibration": {name: told[name] for name in told if name != "reliability"}}
    p, hits = [probabilities(z) for z, _ in logits], [z.argmax(axis=1) == y for z, y in logits]
    brier = [((q - np.eye(VOCABULARY)[y]) ** 2).sum() for q, (_, y) in zip(p, logits, strict=True)]
    for column, expected in (
        (scores.nll_sum, [nll([row]) for row in logits]),
        (scores.n_tokens, map(len, hits)),
        (scores.n_correct, map(sum, hits)),
        (brier_sum, brier),
    ):
        np.testing.assert_allclose(column, [*expected], rtol=1e-12)
    confidence, correct = np.concatenate([q.max(axis=1) for q in p]), np.concatenate(hits)
    assert (told["examples"], told["tokens"]) == (len(DATA), len(confidence))
    means = [nll(logits) / told["tokens"], correct.mean(), confidence.mean(), sum(brier) / told["tokens"]]
    assert [told[name] for name in ("nll", "accuracy", "confidence", "brier")] == pytest.approx(means, rel=1e-12)
    for bin, expected in zip(told["reliability"], reliability(confidence, correct), strict=True):
        assert bin == pytest.approx(expected, rel=1e-12)
    distances = [b["count"] * abs(b["accuracy"] - b["confidence"]) for b in told["reliability"]]
    assert told["ece"] == pytest.approx(sum(distances) / told["tokens"])
    tempered = np.stack([tempered_of(*row) for row in logits])
    scaled = temperature_scaling(tempered, scores.n_tokens, [e.id for e in DATA])
    assert [told[name] for name in scaled] == [pytest.approx(figure, rel=1e-9) for figure in scaled.values()]


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_scale_bias_and_cap_of_the_head_come_before_the_temperature(block, monkeypatch):
    """The NLL at each temperature, and both derivatives by its inverse, are those of the logits."""
    monkeypatch.setattr(fused, "block_rows", lambda *_: block)
    torch.manual_seed(0)
    linear = nn.Linear(8, 19).double()
    hidden, labels = 3 * torch.randn(23, 8, dtype=torch.float64), torch.randint(0, 19, (23,))
    with torch.no_grad():
        z = 2.5 * torch.tanh(0.7 * (hidden @ linear.weight.T + linear.bias) / 2.5)
        confidence, correct, brier, tempered = token_statistics(hidden, Head(linear, 2.5, 0.7), labels)
    p = z.softmax(1)
    torch.testing.assert_close(confidence, p.max(1).values)
    assert torch.equal(correct, z.argmax(1) == labels)
    torch.testing.assert_close(brier, ((p - nn.functional.one_hot(labels, 19)) ** 2).sum(1))
    for tau, column in zip(TAUS, tempered.unbind(1), strict=True):
        q = (z / tau).softmax(1)
        mean = (q * z).sum(1)
        loss = nn.functional.cross_entropy(z / tau, labels, reduction="none")
        derivatives = [mean - z[range(23), labels], (q * (z - mean[:, None]) ** 2).sum(1)]
        torch.testing.assert_close(column, torch.stack([loss, *derivatives], 1))


@pytest.mark.parametrize("spread", [1, 300])
def test_a_masked_token_of_the_vocabulary_is_as_if_it_were_not_there(spread):
    """Also beside logits so far apart that exp has nothing but zeros for most."""
    torch.manual_seed(0)
    linear, hidden, rest = nn.Linear(4, 7).double(), torch.randn(40, 4, dtype=torch.float64), nn.Linear(4, 6).double()
    with torch.no_grad():
        linear.weight *= spread
        linear.bias[6] = -torch.inf
        rest.weight.copy_(linear.weight[:6])
        rest.bias.copy_(linear.bias[:6])
        labels = torch.arange(40) % 6
        got, expected = (token_statistics(hidden, Head(head, None, 1.0), labels) for head in (linear, rest))
        least = (rest(hidden) - rest(hidden).amax(1, keepdim=True)).min()
    assert (least < -300) == (spread == 300)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-24)


def test_a_broken_model_is_not_calibrated(tmp_path):
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    found = measured(model, tmp_path)
    assert (found.figures, found.files) == ({}, {})
    with pytest.raises(NonFiniteError, match="11 examples have no finite NLL"):
        held_out_metrics(found.scores)


# ------------------------------------------------------------------------------------------- figures


def test_bins_have_equal_mass_and_hold_every_token():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=1000)
    correct = rng.uniform(size=1000) < confidence**2
    parts = np.array_split(np.argsort(confidence), [round(1000 * k / 15) for k in range(1, 15)])
    for found, part in zip(reliability(confidence, correct), parts, strict=True):
        expected = {"confidence": confidence[part].mean(), "accuracy": correct[part].mean(), "count": len(part)}
        assert found == pytest.approx(expected, rel=1e-12)


def test_tied_tokens_share_a_bin_wherever_they_stand():
    """A model that is certain of many tokens."""
    confidence = np.array([1.0] * 50 + [0.25, 0.75] * 25)
    correct = np.arange(100) % 3 == 0
    curve = reliability(confidence, correct)
    assert curve == reliability(confidence[::-1], correct[::-1])
    assert [b["count"] for b in curve] == [25, 25, 50]


def tempered_of(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """f64[len(TAUS), 3], the sums over tokens of given logits: a head that changes nothing."""
    linear = nn.Linear(z.shape[1], z.shape[1], bias=False).double()
    with torch.no_grad():
        nn.init.eye_(linear.weight)
        found = token_statistics(torch.from_numpy(z), Head(linear, None, 1.0), torch.from_numpy(y))
    return found[-1].sum(0).numpy()


@pytest.fixture(scope="module")
def overconfident(logits) -> list[tuple[np.ndarray, np.ndarray]]:
    """The model's logits with labels drawn from softmax(logits / 1.7), row after row."""
    rng = np.random.default_rng(0)
    return [(z, np.array([rng.choice(VOCABULARY, p=p) for p in probabilities(z, 1.7)])) for z, _ in logits]


@pytest.mark.parametrize("true", [0.37, 0.8, 1.0, 1.9, 6.0])
def test_a_known_temperature_is_found(true):
    """Labels drawn from softmax(z / true): what a search in the exact NLL finds is found to 1e-3."""
    rng = np.random.default_rng(3)
    z = 4 * rng.standard_normal((3000, 11))
    y = np.array([rng.choice(11, p=p) for p in probabilities(z, true)])
    curve, tau = fitted_temperature(tempered_of(z, y))
    assert tau == pytest.approx(finest([(z, y)]), rel=1e-3)
    assert tau == pytest.approx(true, rel=0.08)
    assert curve(-np.log(tau)) / 3000 == pytest.approx(nll([(z, y)], tau) / 3000, abs=2e-6)
    for at in np.geomspace(TAUS[-1], TAUS[0], 9):
        assert curve(-np.log(at)) == pytest.approx(nll([(z, y)], at), rel=1e-5)


def test_each_half_is_judged_at_the_temperature_of_the_other(overconfident):
    ids = [e.id for e in DATA]
    counts = np.array([len(y) for _, y in overconfident])
    got = temperature_scaling(np.stack([tempered_of(*row) for row in overconfident]), counts, ids)
    ranked = sorted(range(11), key=lambda i: stable_hash("calibration_fold", ids[i]))
    halves = [[overconfident[i] for i in ranked[k::2]] for k in (0, 1)]
    taus = [finest(half) for half in halves]
    assert abs(taus[0] - taus[1]) > 0.05  # else it would not matter which is used where
    assert got["temperatures"] == pytest.approx(taus, rel=1e-3)
    assert got["temperature"] == pytest.approx(sum(taus) / 2, rel=1e-3)
    expected = (nll(halves[1], taus[0]) + nll(halves[0], taus[1])) / counts.sum()
    assert got["nll_temperature_scaled"] == pytest.approx(expected, rel=1e-5)
    assert got["temperature_at_limit"] is False


def test_a_fit_beyond_the_grid_says_so():
    for labels, limit in ((np.arange(3), TAUS[-1]), (np.array([1, 2, 0]), TAUS[0])):
        sums = tempered_of(np.eye(3), labels)
        got = temperature_scaling(np.stack([sums, sums]), np.array([3, 3]), ["a", "b"])
        assert got["temperatures"] == [limit, limit]
        assert got["temperature_at_limit"] is True
