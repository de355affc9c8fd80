"""Losses of the shelf against their formulas on one example at a time in float64, and its choices on rows by hand."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch

from sftmix.components import catalogue
from sftmix.disk.tables import write_dynamics
from sftmix.types import Scores, Split
from tests.tiny import ROOT
from tests.toy import toy_model
from tests.training.test_objectives import REFERENCE, reference
from tests.training.test_step import DATA, UNITS, nll, ours, response

catalogue()  # as a command does: the shipped classes are there first
IDEAS = ROOT / "docs" / "examples" / "ideas"
ROWS = [slot.row for unit in UNITS for slot in unit if slot.ntp_weight]
N = sum(int(DATA[row].target[1:].sum()) for row in ROWS)


@pytest.fixture(scope="module")
def model():
    return toy_model()


@pytest.fixture
def idea(monkeypatch):
    """module.Class -> the class, from the directory of the shelf."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(IDEAS)])
    return lambda path: getattr(importlib.import_module(path.partition(".")[0]), path.partition(".")[2])


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("reference") / "dynamics.parquet"
    write_dynamics(file, REFERENCE)
    return str(file)


def logits_of(model, row):
    """Return (logits [T, V], labels [T]) of a row by itself."""
    hidden, labels, _ = response(model, DATA[row])
    return hidden @ model.get_output_embeddings().weight.T, labels


def summed(model, term):
    """Return sum over rows of term(row, logits, labels), over the number of response tokens."""
    return float(sum(term(row, *logits_of(model, row)).sum() for row in ROWS).detach()) / N


@pytest.mark.parametrize("cut", [{}, {"world": 3, "micro": 2}], ids=str)
def test_info_sft_weighs_by_the_logit_of_the_own_probability(model, idea, cut):
    def term(row, logits, y):
        q = (-nll(logits, y)).exp().detach()
        return nll(logits, y) * q * (1 - (q / (1 - q)).log() / 1.5).clamp(min=0)

    loss, _ = ours(model, idea("info_sft.InfoSFT")(c=1.5), UNITS, **cut)
    assert loss == pytest.approx(summed(model, term), rel=1e-6)


def test_proximal_sft_has_the_gradient_of_the_clipped_ratio(model, idea):
    old, surrogate = toy_model(seed=3), 0
    for row in ROWS:
        ratio = (nll(*logits_of(old, row)).detach() - nll(*logits_of(model, row))).exp()
        surrogate = surrogate - torch.minimum(ratio, ratio.clamp(0.5, 1.5)).sum() / N
    surrogate.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    _, found = ours(model, idea("proximal_sft.ProximalSFT")(epsilon=0.5), UNITS, teacher=old)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_mean_teacher_pulls_by_the_divergence_from_it(model, idea):
    old = toy_model(seed=3)

    def term(row, logits, y):
        expected, own = (one.log_softmax(-1) for one in (logits_of(old, row)[0], logits))
        return nll(logits, y) + 0.25 * (expected.exp() * (expected - own)).sum(-1)

    loss, _ = ours(model, idea("ema_teacher.EMATeacher")(weight=0.25), UNITS, teacher=old)
    assert loss == pytest.approx(summed(model, term), rel=1e-6)


def test_ss_token_trains_the_tokens_that_have_fallen_most(model, idea, stored):
    counted = []

    def term(row, logits, y):
        fallen = (reference(row, 0) - nll(logits, y)).tolist()
        chosen = sorted(range(len(y)), key=lambda t: -fallen[t])[: math.ceil(0.5 * len(y))]
        counted.extend(chosen)
        return nll(logits, y)[chosen]

    expected = summed(model, term) * N / len(counted)
    loss, _ = ours(model, idea("ss_token.SSToken")(dynamics=stored, share=0.5), UNITS)
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("cut", [{}, {"world": 3, "micro": 2}], ids=str)
def test_wit_with_equal_weights_is_the_mean_nll_of_all_tokens(model, idea, cut):
    """As transformers computes it from labels, one example at a time."""
    total = count = 0
    for row in ROWS:
        ids = torch.from_numpy(DATA[row].input_ids)[None]
        total += float(model(input_ids=ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    loss, _ = ours(model, idea("wit.WIT")(prompt=1.0), UNITS, **cut)
    assert loss == pytest.approx(total / count, rel=1e-6)


def test_r_drop_without_dropped_tokens_is_ntp_and_with_them_is_more(model, idea):
    ntp = summed(model, lambda row, logits, y: nll(logits, y))
    cls = idea("r_drop.RDrop")
    assert ours(model, cls(share=0.0, weight=9.0), UNITS)[0] == pytest.approx(ntp, rel=1e-6)
    apart = [ours(model, cls(share=0.3, weight=weight), UNITS)[0] for weight in (0.0, 1.0, 2.0)]
    assert apart[0] < apart[1]
    assert apart[2] - apart[1] == pytest.approx(apart[1] - apart[0], rel=1e-6), "the divergence is weighed by `weight`"


def test_a_teachers_likeliest_tokens_are_the_labels(model, idea, tmp_path):
    teacher = toy_model(seed=3)
    teacher.save_pretrained(tmp_path)

    def term(row, logits, y):
        p = torch.softmax(logits_of(teacher, row)[0], -1)
        top = p.topk(5)
        soft = -(top.values / top.values.sum(-1, keepdim=True) * logits.log_softmax(-1).gather(1, top.indices)).sum(-1)
        return 0.75 * nll(logits, y) + 0.25 * soft

    objective = idea("teacher_smoothing.TeacherSmoothing")(teacher=str(tmp_path), epsilon=0.25, top=5)
    assert ours(model, objective, UNITS)[0] == pytest.approx(summed(model, term), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- choices


def scores_of(confidence, texts=None) -> Scores:
    n = len(confidence)
    numbers = np.array(confidence, dtype=np.float64)
    return Scores([f"id-{k}" for k in range(n)], np.arange(n), numbers, np.zeros(n), np.full(n, 3), texts=texts)


def test_cycles_go_back_and_forth_over_the_ranks(idea):
    scores = scores_of([-8.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0])  # ranked: 1 2 3 4 5 6 7 0
    rows = idea("cyclic.Cyclic")(cycles=2).rows(scores, epoch=0, seed=0)
    assert rows.tolist() == [1, 3, 5, 7, 0, 6, 4, 2]


def test_near_partners_share_words_and_far_ones_do_not(idea):
    texts = [("q", "a a b"), ("q", "c c d"), ("q", "c d d"), ("q", "a b b")]
    split = Split(np.array([0, 0, 1, 1], dtype=np.int8), ("confident", "unconfident"))
    cls = idea("nearest_pairs.NearestPairs")
    near, far = (
        cls(farthest=farthest).pairs(split, scores_of([-1.0] * 4, texts), epoch=0, seed=0) for farthest in (False, True)
    )
    assert sorted(near.tolist()) == [[0, 3], [1, 2]]
    assert sorted(far.tolist()) == [[0, 2], [1, 3]]


def test_a_centre_is_far_from_those_before_it(idea):
    texts = [("a b", "c"), ("a b", "c"), ("x y", "z"), ("a b", "d")]
    chosen = idea("k_centre.KCentre")(share=0.75).select(scores_of([np.nan] * 4, texts), seed=0)
    assert chosen.tolist() == [0, 2, 3]


def test_hard_rows_have_the_highest_ifd_below_one(idea):
    for name in ("cherry.Cherry", "superfiltering.Superfiltering"):
        chosen = idea(name)(share=0.5).select(scores_of([-1.2, -0.9, -0.3, np.nan, -0.95]), seed=0)
        assert chosen.tolist() == [4, 1]
