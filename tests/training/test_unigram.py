"""Smoothing towards the frequencies of the response tokens, against F.cross_entropy with the targets written out."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sftmix.batches.collate import collate
from sftmix.components import NTP, LossView, Objective, ProFit, SFTMix, UnigramSmoothing
from sftmix.model.head import Head
from sftmix.ranks.world import World
from sftmix.training.loop import TrainingLoop
from sftmix.words.errors import ConfigError, DataError
from tests.forked import on_ranks
from tests.toy import VOCABULARY, toy_model, toy_stage
from tests.training.test_step import DATA, UNITS, Exact, assert_same, one_step, ours, response, value_and_gradients

CUTS = [{}, {"world": 3, "micro": 2}, {"world": 2, "padding_free": True}]
TRAINED = [slot.row for unit in UNITS for slot in unit if slot.ntp_weight]
OF_RUN = {"packed": False, "layers": 2, "vocabulary": VOCABULARY, "total_steps": 3}
BATCH = collate(UNITS, DATA)


def frequencies(rows=DATA) -> torch.Tensor:
    """Those of the response tokens of all rows that are trained on; a first token is never predicted."""
    counts = Counter(
        token for row in rows for place, token in enumerate(row.input_ids.tolist()) if place and row.target[place]
    )
    return torch.tensor([counts[token] for token in range(VOCABULARY)], dtype=torch.float64) / counts.total()


def targets(labels: torch.Tensor, epsilon: float, q: torch.Tensor) -> torch.Tensor:
    return (1 - epsilon) * F.one_hot(labels, VOCABULARY).double() + epsilon * q


def smoothed(z: torch.Tensor, labels: torch.Tensor, epsilon: float, q: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z, targets(labels, epsilon, q), reduction="none")


Formula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The loss of each token, of its logits and label."""


def mean_of(model, formula: Formula) -> torch.Tensor:
    """The mean over the response tokens of the rows that are trained, on one row at a time."""
    losses = []
    for row in TRAINED:
        hidden, labels, _ = response(model, DATA[row])
        losses.append(formula(hidden @ model.get_output_embeddings().weight.T, labels))
    return torch.cat(losses).mean()


def check_cut(objective: Objective, formula: Formula, *, tied: bool, cut: dict) -> None:
    """A global batch, however it is cut up, has the loss and the gradients of the formula."""
    model = toy_model(tied=tied)
    found = ours(model, Exact(objective=objective, seen={}), UNITS, **cut)
    assert_same(found, value_and_gradients(model, mean_of(model, formula)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_global_batch_cut_up_is_the_formula(tied, cut):
    objective = UnigramSmoothing(epsilon=0.3)
    objective.begin(DATA)
    check_cut(objective, lambda z, labels: smoothed(z, labels, 0.3, frequencies()), tied=tied, cut=cut)


def head_with(bias: bool, softcap: float | None, scale: float, adapted: bool) -> Head:
    module = nn.ModuleDict({"head": nn.Linear(16, VOCABULARY, bias=bias)}).double()
    if adapted:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"]), module)
        nn.init.normal_(module["head"].lora_B["default"].weight)
    return Head(module["head"].double(), softcap, scale)


OF_HEAD = {
    "bias": st.booleans(),
    "softcap": st.sampled_from([None, 1.5, 30.0]),
    "scale": st.sampled_from([1.0, 0.25, 40.0]),
    "adapted": st.booleans(),
}


def check_head(objective: Objective, formula: Formula, head: Head) -> None:
    """The weighted loss of a batch, and its gradients by states and head, are those of the formula."""
    hidden = torch.randn(len(BATCH.labels), 16, dtype=torch.float64, requires_grad=True)
    plan = objective.plan(BATCH)
    plan = replace(plan, row_weight=plan.row_weight.double())  # as a step divides it
    each = formula(head.logits(hidden), BATCH.labels)
    inputs = [hidden, *(p for p in head.module.parameters() if p.requires_grad)]
    both = objective.loss(LossView(head, lambda: hidden), BATCH, plan).loss, (plan.row_weight * each).sum()
    found, expected = ([loss.detach(), *torch.autograd.grad(loss, inputs)] for loss in both)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@given(
    **OF_HEAD,
    epsilon=st.floats(0.01, 0.99),
    size=st.integers(1, VOCABULARY),
    seed=st.integers(0, 9),
)
def test_every_head_has_the_formula_and_its_gradients(tmp_path_factory, epsilon, size, seed, **of_head):
    torch.manual_seed(seed)
    head, counts = head_with(**of_head), torch.rand(size, dtype=torch.float64) + 0.1
    file = tmp_path_factory.mktemp("own") / "counts.npy"
    np.save(file, counts.numpy())
    objective = UnigramSmoothing(epsilon=epsilon, distribution=str(file))
    objective.begin([])
    q = F.pad(counts / counts.sum(), (0, VOCABULARY - size))
    check_head(objective, lambda z, labels: smoothed(z, labels, epsilon, q), head)


def test_the_smoothing_of_a_plain_head_makes_no_logits(monkeypatch):
    objective = UnigramSmoothing()
    objective.begin(DATA)
    hidden = torch.randn(len(BATCH.labels), 16, dtype=torch.float64)
    asked = []
    monkeypatch.setattr("sftmix.functional.chunked_loss", lambda *given, **more: asked.append(given) or 1 / 0)
    objective.loss(LossView(head_with(False, None, 1.0, False), lambda: hidden), BATCH, objective.plan(BATCH))
    assert not asked


def test_the_head_of_bfloat16_gets_gradients_that_are_not_added_up_in_it():
    """FSDP's weights: of 20,000 tokens a twentieth have one label, and a sum of 1,000 gradients stalls."""
    torch.manual_seed(0)
    objective, tokens = UnigramSmoothing(epsilon=0.5), 20_000
    objective.q = torch.full([VOCABULARY], 1 / VOCABULARY, dtype=torch.float64).numpy()
    batch, plan = replace(BATCH, labels=torch.arange(tokens) % 20), objective.plan(BATCH)
    plan = replace(
        plan, row_weight=torch.full([tokens], 1 / tokens), pairs=plan.pairs[:0], pair_weight=plan.pair_weight[:0]
    )
    states = 1 + torch.rand(tokens, 16)
    made = []
    for dtype in (torch.bfloat16, torch.float64):
        module = nn.Linear(16, VOCABULARY, bias=False).to(dtype)
        nn.init.zeros_(module.weight)
        hidden = states.to(torch.bfloat16).to(dtype)
        view = LossView(Head(module, None, 1.0), lambda hidden=hidden: hidden)
        (gradient,) = torch.autograd.grad(objective.loss(view, batch, plan).loss, module.weight)
        made.append(gradient.double())
    torch.testing.assert_close(*made, rtol=2**-6, atol=1e-6)


def test_without_a_mass_it_is_ntp_to_the_bit():
    made = []
    for objective in (NTP(), UnigramSmoothing(epsilon=0)):
        objective.begin(DATA)
        model = toy_model(dtype=torch.float32)
        done = one_step(model, objective, rate=0.125)
        made.append([torch.tensor(done.loss), *(p.detach() for p in model.parameters())])
    assert all(map(torch.equal, *made))


def test_a_method_around_it_counts_as_well():
    inner = UnigramSmoothing()
    ProFit(mixup=inner).begin(DATA)
    np.testing.assert_allclose(inner.q, frequencies().numpy()[: len(inner.q)], rtol=1e-12)


def test_a_first_token_which_is_never_predicted_does_not_count():
    row = DATA[0]
    objective = UnigramSmoothing()
    objective.begin([replace(row, target=np.ones_like(row.target))])
    counts = Counter(row.input_ids.tolist()[1:])
    expected = [counts[token] / (len(row.input_ids) - 1) for token in range(len(objective.q))]
    np.testing.assert_allclose(objective.q, expected, rtol=1e-12)


def check_ranks(world: World, directory: str) -> None:
    objective = UnigramSmoothing(epsilon=0.3)
    stage = toy_stage(Path(directory), [UNITS, UNITS], data=DATA, objective=objective)
    loop = TrainingLoop(stage, world)
    expected = frequencies([DATA[row] for row in stage.order.rows])
    for q in world.gather(objective.q):
        np.testing.assert_allclose(q, expected.numpy()[: len(q)], rtol=1e-12)
    right = mean_of(toy_model(), lambda z, labels: smoothed(z, labels, 0.3, expected))
    assert loop.advance()["loss"] == pytest.approx(float(right), rel=1e-6)


def test_two_ranks_count_the_same_and_train_by_the_formula(tmp_path):
    on_ranks(check_ranks, str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [[0.5, -0.1], [0, 0], [1, float("nan")], [1, float("inf")], [], [[1, 2]], {"3": 1}, "words", ["a"], ["1"], [True]],
    ids=str,
)
def test_a_file_that_is_no_distribution_is_refused(tmp_path, content):
    file = tmp_path / "q.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"objective\.distribution: .*q\.json: it must be a list of finite"):
        UnigramSmoothing(distribution=str(file)).check({}, **OF_RUN)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "q.npy").write_bytes(b"")
    (tmp_path / "q.json").write_text("[1,")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    np.save(tmp_path / "complex.npy", np.array([1 + 2j, 1]))
    for name in ("q.npy", "q.json", "deep.json", "complex.npy"):
        with pytest.raises(DataError, match=rf"objective\.distribution: .*{name}: it must be a list"):
            UnigramSmoothing(distribution=str(tmp_path / name)).check({}, **OF_RUN)
    with pytest.raises(DataError, match=r"objective\.distribution: .*none\.npy: there is no such file"):
        UnigramSmoothing(distribution=str(tmp_path / "none.npy")).files()


@pytest.mark.parametrize(
    "counts",
    [np.full(700, 100, np.float16), np.array([2**62, 2**62, 2**62]), np.array([200, 100], np.uint8)],
    ids=["float16", "int64", "uint8"],
)
def test_counts_whose_sum_is_too_large_for_their_dtype_are_counts(tmp_path, counts):
    np.save(tmp_path / "q.npy", counts)
    (tmp_path / "q.json").write_text(str([10**25, *map(int, counts)]))
    for name, expected in (("q.npy", counts), ("q.json", [1e25, *counts])):
        objective = UnigramSmoothing(distribution=str(tmp_path / name))
        objective.begin([])
        np.testing.assert_allclose(objective.q, np.float64(expected) / np.float64(expected).sum(), rtol=1e-12)


def test_tokens_of_another_vocabulary_are_refused_and_spare_ids_without_a_share_are_not(tmp_path):
    objective = UnigramSmoothing(distribution=str(tmp_path / "q.npy"))
    np.save(tmp_path / "q.npy", np.r_[np.ones(VOCABULARY), 0, 0])
    ProFit(mixup=objective).check({}, **OF_RUN)
    np.save(tmp_path / "q.npy", np.r_[np.ones(VOCABULARY), 0, 1])
    for one in (objective, ProFit(mixup=objective)):
        with pytest.raises(ConfigError, match=r"objective\.distribution is .*; allowed: shares of the model's 61 "):
            one.check({}, **OF_RUN)
    SFTMix().check({}, **OF_RUN)


def test_a_run_refuses_it_before_the_reference_is_trained(finished, sftmix, tmp_path):
    np.save(tmp_path / "q.npy", np.ones(10**6))
    shown = ["--model.path", str(finished.tiny.model), "--data.train", str(finished.tiny.train)]
    own = ["--objective", "UnigramSmoothing", "--objective.distribution", str(tmp_path / "q.npy")]
    done = sftmix("run", *shown, *own, "--pairing", "auto", "--out", str(tmp_path / "run"))
    assert done.code == 2, done.err
    assert "objective.distribution is " in done.err
    assert not (tmp_path / "run" / "train").exists()
