"""Scoring against a loop over `model(...).logits`, one example at a time, in float64 (T24, T26, T27, T29); and the
checkpoints at which a reference is scored, put side by side."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot, Unit
from sftmix.components import Callback, Perplexity, SFTMix
from sftmix.disk.files import steps_in
from sftmix.functional import reference_sft_loss
from sftmix.model.head import head_of
from sftmix.ranks.world import World
from sftmix.training import scoring
from sftmix.training.dynamics import ScoreAtCheckpoints, checkpoint_steps, merge_dynamics, one_checkpoint
from sftmix.training.loop import train
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import wrap
from sftmix.training.scoring import Scorer, held_out_metrics
from sftmix.types import RowLosses, TrainingDynamics
from sftmix.words.errors import ConfigError, NonFiniteError, Stopped
from tests.forked import on_ranks
from tests.model.test_models import build
from tests.toy import Interrupt, ToyRows, own_logits, own_nll, toy_model, toy_rows, toy_stage

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
    if "token_nll" in scores.kept:
        for ours, (_, _, _, theirs) in zip(scores.kept["token_nll"], expected, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    """Padded tokens per scoring batch so few that there are five batches, an odd number."""
    monkeypatch.setattr(scoring, "CPU_SCORING_TOKENS", 128)


@pytest.mark.parametrize("tied", [False, True])
def test_the_sums_are_those_of_the_models_own_logits(tied):
    model = toy_model(tied=tied)
    scores = Scorer(world=World(), keep=["token_nll"])(TrainingModule(model), DATA)
    assert_scores(scores, by_hand(model, DATA), tolerance=1e-12)
    assert scores.n_correct.sum() > 0


def test_entropy_margin_and_mean_state_are_those_of_the_models_own_logits():
    """Of the last checkpoint the states, of each the entropies; in the order of the rows and of `keep`."""
    model = toy_model()
    module = TrainingModule(model)
    scores = Scorer(world=World(), keep=["states", "margin", "entropy"])(module, DATA)
    for row, (logits, _) in enumerate(own_logits(model.eval(), DATA)):
        log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        np.testing.assert_allclose(scores.kept["entropy"][row], -(np.exp(log_p) * log_p).sum(1), rtol=1e-6)
        ordered = np.sort(logits, axis=1)
        np.testing.assert_allclose(scores.kept["margin"][row], ordered[:, -1] - ordered[:, -2], rtol=1e-6, atol=1e-7)
        batch = collate([(Slot(row),)], DATA)
        mean = module.hidden_states(batch).mean(0).detach().numpy()
        np.testing.assert_allclose(scores.kept["states"][row], mean, rtol=2**-10, atol=2**-14)
    ids = [str(row) for row in range(len(DATA))]
    first, last = (one_checkpoint(ids, step, scores) for step in (1, 2))
    merged = merge_dynamics([first, last]).of(ids[::-1])
    assert merged.token_entropy[0].shape == (2, int(scores.n_tokens[-1]))
    np.testing.assert_array_equal(merged.states, np.stack(scores.kept["states"])[::-1])


@pytest.mark.parametrize("family", ["gemma2", "granite", "hyperclovax", "cohere", "phi (head bias)"])
def test_bias_soft_cap_and_scale_of_a_head_are_scored_and_trained(family):
    model = build(family)
    module, head = TrainingModule(model), head_of(model)
    np.testing.assert_allclose(
        Scorer(world=World())(module, DATA).nll_sum, [nll.sum() for nll in own_nll(model, DATA)], rtol=1e-5
    )
    batch, objective = collate([(Slot(0), Slot(1)), (Slot(3), Slot(4)), (Slot(9),)], DATA), SFTMix(mu=0.5)
    plan = objective.plan(batch, step=0, total_steps=9, seed=5)
    expected = reference_sft_loss(
        module.hidden_states(batch),
        head.weight,
        batch.labels,
        plan.pairs,
        plan.lam,
        row_weight=plan.row_weight,
        pair_weight=plan.pair_weight,
        bias=head.bias,
        softcap=head.softcap,
        scale=head.scale,
    )
    found = module(batch, plan, loss=objective.loss)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.mixup, expected.mixup, rtol=1e-5, atol=0)


def test_float32_is_float32(several_batches):
    model = toy_model(dtype=torch.float32)
    scores = Scorer(world=World())(TrainingModule(model), DATA)
    assert_scores(scores, by_hand(model, DATA), tolerance=2e-6)
    assert scores.kept == {}


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


def test_exact_match_is_the_share_of_rows_whose_every_token_is_the_argmax():
    tokens, correct = np.array([2, 4, 1, 3]), np.array([2, 3, 0, 3])
    found = held_out_metrics(RowLosses(np.array([1.0, 5.0, 7.0, 2.0]), tokens, correct))
    assert found == {"eval_nll": 15 / 10, "eval_accuracy": 8 / 10, "eval_exact_match": 2 / 4}


def score_all_ways(world: World) -> None:
    """Five batches on two ranks, and one: a rank has nothing of its own."""
    one = Scorer(world=World(), keep=["token_nll"])(TrainingModule(toy_model()), DATA)
    for parallel in ("ddp", "fsdp"):
        for scoring.CPU_SCORING_TOKENS in (128, 100000):
            module = wrap(TrainingModule(toy_model()), parallel=parallel, precision="fp32", world=world)
            two = Scorer(world=world, keep=["token_nll"])(module, DATA)
            np.testing.assert_allclose(two.nll_sum, one.nll_sum, rtol=1e-12)
            assert two.n_tokens.tolist() == one.n_tokens.tolist()
            assert two.n_correct.tolist() == one.n_correct.tolist()
            np.testing.assert_allclose(*(np.concatenate(scores.kept["token_nll"]) for scores in (two, one)), rtol=1e-6)


def test_two_ranks_give_the_table_of_one():
    """T24: nothing is counted twice, whatever the rank."""
    on_ranks(score_all_ways)


# ------------------------------------------------------------------------------------------------ training dynamics


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


def trained_with_scores(world: World, directory: str) -> None:
    """A node that has once looked for a file on NFS remembers for half a minute that it is not there."""
    missed = set[Path]()

    def exists(path: Path, **_: bool) -> bool:
        if path in missed or not os.path.exists(path):
            missed.add(path)
        return path not in missed

    if not world.is_main:
        Path.exists = exists  # type: ignore[method-assign]
    callback = ScoreAtCheckpoints(ids=DATA.ids, steps=[0, 2], directory=Path(directory, "scores"), world=world)
    batches: list[list[Unit]] = [[(Slot(0),), (Slot(1),)]] * 2
    train(toy_stage(Path(directory), batches, data=DATA, scorer=Scorer(world=world), callbacks=[callback]), world)
    assert callback.dynamics().steps.tolist() == [0, 2]


@pytest.mark.slow
def test_scores_are_looked_for_by_the_rank_that_writes_them(tmp_path):
    on_ranks(trained_with_scores, str(tmp_path))


def test_merge_puts_checkpoints_side_by_side_and_of_joins_by_id():
    def one(step):
        nll = np.array([[1.0], [2.0]]) * step
        tokens = [np.full((1, 2), step, np.float32), np.full((1, 3), -step, np.float32)]
        return TrainingDynamics(
            ["a", "b"], np.array([step]), nll, np.array([2, 3]), np.array([[1], [2]]), tokens, nll + 1
        )

    both = merge_dynamics([one(4), one(8)])
    assert both.steps.tolist() == [4, 8]
    assert both.nll_sum.tolist() == [[4.0, 8.0], [8.0, 16.0]]
    assert both.alone_nll_sum.tolist() == [[5.0, 9.0], [9.0, 17.0]]
    assert both.n_correct.tolist() == [[1, 1], [2, 2]]
    assert both.token_nll[1].tolist() == [[-4.0] * 3, [-8.0] * 3]

    joined = both.of(["b", "x", "a"])
    assert joined.n_tokens.tolist() == [3, 0, 2]
    assert joined.nll_sum[[0, 2]].tolist() == [[8.0, 16.0], [4.0, 8.0]]
    assert joined.scored.tolist() == [True, False, True]
    assert joined.token_nll[1].shape == (2, 0)


def scores_with(worst: float) -> RowLosses:
    """The losses of three examples of two tokens, of which the second has this NLL."""
    tokens = [np.full(2, nll / 2, np.float32) for nll in (4.0, worst, 6.0)]
    return RowLosses(np.array([4.0, worst, 6.0]), np.full(3, 2), np.ones(3, np.int64), {"token_nll": tokens})


@pytest.mark.parametrize("worst", [np.nan, np.inf, 1420.0])
def test_an_example_without_a_finite_perplexity_at_any_checkpoint_is_excluded(worst):
    """exp(1420 / 2) is beyond float64, and exp(1418 / 2) is not."""
    merged = merge_dynamics(
        [one_checkpoint(["a", "b", "c"], step, scores_with(worst if step == 2 else 1.0)) for step in (1, 2)]
    )
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
        one_checkpoint(["a", "b"], 1, RowLosses(np.array([np.nan, np.inf]), np.full(2, 2), np.ones(2, np.int64)))


class Scores(Callback):
    """Scores all rows after each step, alone, too."""

    def on_step_end(self, state):
        state.score()
        state.score(alone=True)


def test_a_signal_during_a_scoring_waits_for_its_end_and_saves_the_step(tmp_path):
    callbacks = [Interrupt(step=2), Scores()]
    with pytest.raises(Stopped):
        train(toy_stage(tmp_path, [[(Slot(0),)]] * 3, data=DATA, callbacks=callbacks), World())
    assert steps_in(tmp_path / "checkpoints") == [2]
