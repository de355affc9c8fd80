"""The study of what the soft labels are: its arms are valid, its controls have their formulas, its pilot its rule."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.evidence.softlabels.arms import PermutedPairs, UnigramSmoothing, elsewhere
from benchmarks.evidence.softlabels.run import BF16, FOLDER, MATCHED, ORDER, Study, next_strength, steps, strength_at
from sftmix.components import LossView, RandomPairs
from sftmix.config.read import from_dict
from sftmix.testing import check_objective
from sftmix.types import Plan, Scores, Split

PLAN = (FOLDER.parent / "preregistration-softlabels.md").read_text(encoding="utf-8")
TOKENS = np.array([3, 1, 3, 3, 0, 5])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = Study(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out"))
    study.strengths = dict.fromkeys(MATCHED, 0.05)
    for seed in (3, 901):
        np.save(study.work / f"tokens-{seed}.npy", TOKENS)
    return study


@pytest.fixture
def tokens(tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    return str(tmp_path / "tokens.npy")


def test_the_arms_are_those_of_the_plan(study):
    assert {arm for arm, _ in [*ORDER, *BF16]} | {"SFTMix"} == set(study.variants)
    assert all(f"`{arm}`" in PLAN for arm in study.variants)
    for arm in study.variants:
        config = from_dict(study.config(arm, 3) | {"out": "o"})
        assert (config.seed, config.training.epochs, config.training.global_batch_size) == (3, 8, 16)
        assert (config.training.learning_rate, config.data.max_length) == (1e-4, 256)
        assert config.training.precision == ("bf16" if "bf16" in arm else "fp32")
        assert isinstance(config.resolved_pairing(), RandomPairs)
        assert type(config.splitter).__name__ == "Median"
        if arm in MATCHED:
            assert getattr(config.objective, MATCHED[arm].option) == 0.05
        elif hasattr(config.objective, "mu"):
            assert (config.objective.mu, config.objective.alpha) == (0.2, 0.5)


def test_runs_are_in_the_order_of_the_plan(study):
    assert [seed for arm, seed in ORDER if arm == "Unigram"] == list(range(1, 17))
    assert len(ORDER) == len(set(ORDER)) == 8 + 24 + 32
    assert next(steps(study, "arms", [2])) == ("Unigram", 2)
    assert [*steps(study, "precision", [2, 9])] == [("NTP-bf16", 2), ("SFTMix-bf16", 2)]


def test_smoothing_towards_frequencies_is_the_cross_entropy_with_them(tokens):
    objective, draw = UnigramSmoothing(tokens=tokens, epsilon=0.3), torch.Generator().manual_seed(0)
    check_objective(UnigramSmoothing(tokens=tokens))
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, generator=draw).requires_grad_() for n in (9, 7))
    row_weight, labels = torch.linspace(0, 1, 9, dtype=torch.float64), torch.arange(9) % 7
    nothing = torch.empty(0, dtype=torch.float64)
    plan = Plan(row_weight, torch.empty(0, 2, dtype=torch.long), nothing, nothing, 1.0, 0.0, unpaired=torch.arange(9))
    head = SimpleNamespace(weight=weight, bias=None, softcap=None, scale=1.0)
    found = objective.loss(LossView(head, lambda: hidden), SimpleNamespace(labels=labels), plan).loss
    q = torch.tensor([1, 1, 0, 3, 0, 1, 0], dtype=torch.float64) / 6
    target = 0.7 * torch.eye(7, dtype=torch.float64)[labels] + 0.3 * q
    right = (row_weight * -(target * (hidden @ weight.T).log_softmax(-1)).sum(-1)).sum()
    torch.testing.assert_close(found, right, rtol=1e-13, atol=0)
    of = [torch.autograd.grad(loss, (hidden, weight)) for loss in (found, right)]
    torch.testing.assert_close(*of, rtol=1e-12, atol=1e-14)


def test_other_labels_are_drawn_from_the_training_responses(study, tokens):
    arm = from_dict(study.config("SoftElsewhere", 3) | {"out": "o"}).objective
    check_objective(arm)
    z_c, z_u = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own, lam = (torch.arange(5), torch.arange(5) + 2), torch.linspace(0, 1, 5, dtype=torch.float64)
    other = torch.tensor([3, 1, 0, 5, 3]), torch.tensor([3, 3, 5, 0, 1])
    eye = torch.eye(7, dtype=torch.float64)
    shares = ((lam, 1 - lam), (1 - lam, lam))
    targets = [a[:, None] * eye[y] + b[:, None] * eye[r] for y, r, (a, b) in zip(own, other, shares, strict=True)]
    of = [-(target * z.log_softmax(-1)).sum(-1) for target, z in zip(targets, (z_c, z_u), strict=True)]
    right = lam * of[0] + (1 - lam) * of[1]
    torch.testing.assert_close(elsewhere(z_c, z_u, *own, *other, lam), right, rtol=1e-12, atol=0)
    ids, pairs = ("a", "b", "c", "d"), torch.tensor([[0, 2], [1, 3]])
    batch = SimpleNamespace(
        ids=ids, pair_index=torch.tensor([0, 0, 0, 1]), slot_pairs=pairs, slot=torch.arange(4), weight=None,
        pairs=torch.tensor([[0, 1], [0, 1], [0, 1], [2, 3]]), ntp_weight=torch.ones(4), labels=torch.arange(4),
    )  # fmt: skip
    labels = [arm.plan(batch, step=step, total_steps=4, seed=1).labels for step in (0, 0, 1)]
    assert labels[0].shape == (4, 2)
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])
    assert set(labels[0].flatten().tolist()) <= set(TOKENS.tolist())


def test_permuted_partners_leave_the_batches_as_they_are():
    group = np.repeat([0, 1], 40)
    rows, ones = np.arange(80), np.ones(80)
    scores = Scores([str(row) for row in rows], rows, np.linspace(1, 0, 80), ones, ones.astype(int))
    split = Split(group, ["confident", "unconfident"])
    crossing = []
    for epoch in range(50):
        before = RandomPairs().pairs(split, scores, epoch=epoch, seed=7)
        after = PermutedPairs(batch=8).pairs(split, scores, epoch=epoch, seed=7)
        for start in range(0, 40, 8):
            assert sorted(before[start : start + 8].flatten()) == sorted(after[start : start + 8].flatten())
        assert (after[:, 0] < after[:, 1]).all()  # confidence falls with the row
        crossing.append((group[after[:, 0]] != group[after[:, 1]]).mean())
    assert np.mean(crossing) == pytest.approx(8 / 15, abs=0.04)  # 2,000 pairs: 3.6 standard errors


def test_the_pilot_brackets_the_wanted_temperature():
    def found(temperature, wanted, first, known=()):
        tried = {0.0: 1.4} | {x: temperature(x) for x in known}
        while (strength := next_strength(tried, wanted, first)) is not None:
            tried[strength] = temperature(strength)
        return [*tried][1:], strength_at(tried, wanted)

    assert found(lambda x: 1.4 - x, 1.3, 0.08) == ([0.08, 0.16], 0.1)
    assert found(lambda x: 1.4 - x, 1.35, 0.08) == ([0.08, 0.04], 0.05)
    assert found(lambda x: 1.4 - x, 1.37, 0.04, [0.02]) == ([0.02, 0.04], 0.03)
    assert found(lambda x: 1.4, 1.2, 0.04) == ([0.04, 0.08, 0.16, 0.32, 0.64], 0.64)


def test_the_pilot_weighs_neighbours():
    assert strength_at({0.0: 1.4, 0.04: 1.2, 0.08: 1.0, 0.02: 1.3}, 1.05) == 0.07
