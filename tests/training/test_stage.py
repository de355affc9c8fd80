"""A stage from its start to its end: what changes with the epoch, what stops it, and which steps it skips."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sftmix.batches.order import Slot, TrainingOrder, Unit
from sftmix.components import NTP, MixupOnly, Objective, SFTMix
from sftmix.components.base import Callback, CallbackResult, Perturbation
from sftmix.components.plans import ntp_plan
from sftmix.options import CheckpointOptions, TrainingOptions
from sftmix.ranks.world import World
from sftmix.training import loop
from sftmix.training.checkpoint import full_weights
from sftmix.training.dynamics import OnlineLosses
from sftmix.training.loop import StageResult, train
from sftmix.training.update import learning_rate
from sftmix.types import Split
from sftmix.words.errors import NonFiniteError, Stopped
from tests.forked import on_ranks
from tests.toy import VOCABULARY, Interrupt, metrics_of, own_nll, toy_model, toy_rows, toy_stage
from tests.trained import assert_exact

SIZES = [(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)]
DATA = toy_rows(SIZES)


class Groups(NTP):
    """Keeps the groups that it is shown, step by step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[int, int]] = {}

    def plan(self, batch, *, step, total_steps, seed):
        groups = zip(batch.rows.tolist(), batch.group.tolist(), strict=True)
        self.seen.setdefault(step, {}).update(groups)
        return super().plan(batch, step=step, total_steps=total_steps, seed=seed)


class Calls(Callback):
    """Keeps when it is called, with how many steps and epochs done."""

    gives = frozenset()

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.epochs: list[tuple[int, int]] = []

    def on_stage_start(self, state):
        return CallbackResult({"at_start": 1.0})

    def on_step_end(self, state):
        self.steps.append((state.step, state.epoch))

    def on_epoch_end(self, state):
        self.epochs.append((state.step, state.epoch))
        return CallbackResult({"at_epoch": float(state.epoch)})


def test_what_belongs_to_an_epoch_changes_at_its_end(tmp_path):
    """Three epochs of two steps, the last cut short: groups, the log, callbacks and online losses agree."""
    objective, calls = Groups(), Calls()
    order = TrainingOrder(7, lambda epoch: None, options=TrainingOptions(global_batch_size=4, max_steps=5), seed=1)
    online = OnlineLosses(DATA.ids, tmp_path / "online", World())
    groups = [np.roll([0, 1, 1, 0, -1, 0, 1], epoch).astype(np.int8) for epoch in range(3)]
    more = {"objective": objective, "callbacks": [calls], "online": online, "order": order}
    stage = toy_stage(tmp_path, [], data=DATA, split_of=lambda epoch: Split(groups[epoch], ("a", "b")), **more)
    stage.options = replace(stage.options, warmup_ratio=0.3, schedule="linear")
    train(stage, World())
    epochs = [0, 0, 1, 1, 2]
    for step, epoch in enumerate(epochs):
        rows = [unit[0].row for unit in order.batch(step)]
        assert objective.seen[step] == {row: groups[epoch][row] for row in rows}
    found = metrics_of(tmp_path)
    assert [m["epoch"] for m in found] == epochs
    assert [m["learning_rate"] for m in found] == [learning_rate(step, 5, stage.options) for step in range(5)]
    assert [m.get("at_start") for m in found] == [1.0, None, None, None, None]
    assert [m.get("at_epoch") for m in found] == [None, 1.0, None, 2.0, 3.0]
    assert calls.steps == [(1, 0), (2, 1), (3, 1), (4, 2), (5, 3)]
    assert calls.epochs == [(2, 1), (4, 2), (5, 3)]
    assert online.epochs() == [0, 1]  # not every example had its turn in the third
    for epoch in (0, 1):
        kept = online.read(epoch)
        assert kept.steps.tolist() == [2 * epoch + 2]
        assert kept.n_tokens.tolist() == [int(example.target.sum()) for example in DATA]


class StopAfter(Callback):
    """Asks to stop after a step."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_step_end(self, state):
        return CallbackResult(stop=state.step == self.step)


@pytest.mark.parametrize(("callbacks", "last"), [([StopAfter(step=2)], 2), ([], 4)], ids=["stopped", "ended"])
def test_a_stage_that_ended_or_was_stopped_is_not_trained_on(tmp_path, capsys, callbacks, last):
    """Whenever checkpoints are due, its last step has one; a process that finds only that trains no step more."""
    kept, batches = CheckpointOptions(every=3), [[(Slot(row),)] for row in range(4)]
    first = train(toy_stage(tmp_path, batches, data=DATA, checkpoint=kept, callbacks=callbacks), World())
    log = (tmp_path / "metrics.jsonl").read_bytes()
    again = train(toy_stage(tmp_path, batches, data=DATA, checkpoint=kept), World())
    assert f"train: resuming after step {last} of 4" in capsys.readouterr().out
    assert [done.figures["steps"] for done in (first, again)] == [last, last]
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


# -------------------------------------------------------------------------------- steps that are not finite


class Broken(Perturbation):
    """Not a number in some steps (from 0)."""

    def __init__(self, *, steps: list[int]) -> None:
        self.steps = steps

    def embeddings(self, e, mask, *, ids, step, seed):
        return e * float("nan") if step in self.steps else e


def broken(directory: Path, bad: list[int], *, steps: int) -> StageResult:
    """Steps of a learning rate that moves the weights, saved one by one."""
    given = {"perturbation": Broken(steps=bad), "checkpoint": CheckpointOptions(every=1, keep=9), "data": DATA}
    batches = [[(Slot(0),), (Slot(1),)]] * steps
    return train(toy_stage(directory, batches, options={"learning_rate": 0.01}, **given), World())


def test_three_steps_in_a_row_may_be_skipped_and_change_nothing(tmp_path, capsys):
    done = broken(tmp_path / "a", [1, 2, 3, 5, 6, 7], steps=9)
    assert (done.figures["skipped"], done.figures["steps"]) == (6, 9)
    assert "train: step 2 skipped, gradient norm nan; examples ['example-" in capsys.readouterr().out
    assert [m["step"] for m in metrics_of(tmp_path / "a") if m["grad_norm"] is None] == [2, 3, 4, 6, 7, 8]
    finite = broken(tmp_path / "b", [], steps=3)  # steps 0, 4 and 8
    for ours, theirs in zip(done.module.parameters(), finite.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_before_the_first_update_is_none(tmp_path):
    """The optimizer begins with the first step that is not skipped, in the run and in one that resumes it."""
    whole = broken(tmp_path / "whole", [0, 1], steps=5)
    broken(tmp_path / "resumed", [0, 1], steps=2)
    resumed = broken(tmp_path / "resumed", [0, 1], steps=5)
    finite = broken(tmp_path / "finite", [], steps=3)
    for expected, *ours in zip(*(done.module.parameters() for done in (finite, whole, resumed)), strict=True):
        assert all(torch.equal(own, expected) for own in ours)


def test_too_many_skipped_steps_in_all_stop_the_run_before_and_after_a_resume(tmp_path):
    bad = [*range(0, 12, 2), *range(13, 21, 2)]
    assert broken(tmp_path, bad, steps=18).figures["skipped"] == 9
    for _ in range(2):  # resumed from the last step but one, and from the last
        with pytest.raises(NonFiniteError, match="train: 10 of the first 20 steps, 1 in a row, have a loss or"):
            broken(tmp_path, bad, steps=24)
        assert metrics_of(tmp_path)[-1]["step"] == 19


def test_a_share_of_the_steps_so_far_may_be_skipped(tmp_path, monkeypatch):
    """In a long run one in a hundred; here one in two."""
    monkeypatch.setattr(loop, "MAX_SKIPPED", 0)
    monkeypatch.setattr(loop, "MAX_SHARE", 0.5)
    assert broken(tmp_path / "half", [1, 3], steps=4).figures["skipped"] == 2
    with pytest.raises(NonFiniteError, match="train: 1 of the first 1 steps, 1 in a row"):
        broken(tmp_path / "more", [0], steps=4)


@pytest.mark.slow
def test_skipped_steps_are_counted_on_after_a_resume(tmp_path):
    """In a row, and altogether; after a finite one, the row is over, resumed or not."""
    bad = [1, 2, 4, 5, 6]
    assert broken(tmp_path, bad, steps=6).figures["skipped"] == 4
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "loss": 0.')  # as a kill may leave it
    with pytest.raises(NonFiniteError, match="4 in a row, have a loss or"):
        broken(tmp_path, [*bad, 7], steps=9)
    done = broken(tmp_path, bad, steps=9)
    assert (done.figures["skipped"], done.figures["steps"]) == (5, 9)
    whole = broken(tmp_path / "whole", bad, steps=9)
    assert {**done.figures, "elapsed": None} == {**whole.figures, "elapsed": None}
    seconds = sum(m["tokens"] / m["tokens_per_second"] for m in metrics_of(tmp_path))
    assert done.figures["elapsed"] == pytest.approx(seconds, rel=1e-9)
    for ours, theirs in zip(done.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------- online losses of a skipped step

ROWS = toy_rows(SIZES, vocabulary=VOCABULARY - 1)
BAD, TOKEN = 3, VOCABULARY - 1
ROWS[BAD].input_ids[1] = TOKEN  # which no other example has
OF_TWO: list[list[Unit]] = [
    [(Slot(0), Slot(1)), (Slot(2), Slot(BAD)), (Slot(6), Slot(2, 0.0))],
    [(Slot(4),), (Slot(5),)],
]
"""No weight has moved when the second is computed: the first is skipped where BAD is not finite."""


@pytest.mark.parametrize("padding_free", [True, False])
def test_an_example_that_is_not_finite_costs_no_example_of_another_row_its_loss(tmp_path, padding_free):
    """Padding-free, all examples of the first step stand in the row of BAD: none of them is scored."""
    model = toy_model(dtype=torch.float32)
    model.get_input_embeddings().weight.data[TOKEN] = float("inf")
    options = {"padding_free": padding_free, "micro_batch_size": 8, "length_groups": 1}
    online = OnlineLosses(ROWS.ids, tmp_path / "online", World())
    stage = toy_stage(tmp_path, OF_TWO, model=model, data=ROWS, options=options, online=online)
    assert train(stage, World()).figures["skipped"] == 1
    losses = online.read(0)
    scored = np.isin(np.arange(len(ROWS)), [4, 5] if padding_free else [0, 1, 2, 4, 5, 6])
    np.testing.assert_array_equal(losses.n_tokens, np.where(scored, [n for _, n in SIZES], 0))
    expected = np.array([nll.sum() for nll in own_nll(toy_model(dtype=torch.float32), ROWS)])
    np.testing.assert_allclose(losses.nll_sum[scored, 0], expected[scored], rtol=1e-6)


# -------------------------------------------------------------------------------------- steps in which nothing counts

SIX = toy_rows([(3, 5), (7, 2), (1, 6), (4, 4), (2, 3), (5, 5)])
SPLIT = Split(group=np.array([0, 1, 0, 1, -1, -1], dtype=np.int8), names=("confident", "unconfident"))
LATE: list[list[Unit]] = [[(Slot(4),)], [(Slot(5),)], [(Slot(0), Slot(1))], [(Slot(2), Slot(3))]]
"""Two steps of unpaired rows, then two of pairs."""


def weights_of(place: Path, objective: Objective, *, every: int = 0, stop: int = -1) -> dict[str, torch.Tensor]:
    stage = toy_stage(
        place,
        LATE,
        data=SIX,
        model=toy_model(dtype=torch.float32),
        objective=objective,
        options={"learning_rate": 0.01},
        checkpoint=CheckpointOptions(every=every),
        split_of=lambda epoch: SPLIT,
        callbacks=[Interrupt(step=stop)],
    )
    return full_weights(train(stage, World()).module)


@pytest.mark.parametrize("objective", [MixupOnly(), SFTMix(ntp_on="confident")])
def test_checkpoints_among_them_change_no_weight(tmp_path, objective):
    whole = weights_of(tmp_path / "whole", objective)
    assert_exact(whole, weights_of(tmp_path / "saved", objective, every=1))
    for stop in (1, 3):
        with pytest.raises(Stopped):
            weights_of(tmp_path / f"{stop}", objective, stop=stop)
        assert_exact(whole, weights_of(tmp_path / f"{stop}", objective))


class PairsApart(SFTMix):
    """SFTMix whose plan of a micro-batch without pairs is that of NTP, which knows no mu."""

    def plan(self, batch, **given):
        return super().plan(batch, **given) if len(batch.pairs) else ntp_plan(batch, batch.ntp_weight)


def check_apart(world: World, directory: str) -> None:
    """The log is that of SFTMix, whichever rank and micro-batch has the pair; a repeated pair alone moves weights."""
    repeated: list[Unit] = [(Slot(4, 0.0),), (Slot(5, 0.0),), (Slot(0, 0.0), Slot(1, 0.0))]
    batches: list[list[Unit]] = [[(Slot(4),), (Slot(5),), (Slot(0), Slot(1))], repeated]
    for mean, moving in (("own", 2), ("ntp", 1)):
        found, moved = [], []
        for kind in (SFTMix, PairsApart):
            place = Path(directory, f"{mean}-{kind.__name__}")
            more = {"data": SIX, "split_of": lambda epoch: SPLIT, "objective": kind(mu=0.75, mixup_mean=mean)}
            done = train(toy_stage(place, batches, options={"micro_batch_size": 2}, **more), world)
            moved.append(done.figures.get("updates"))
            found.append([done.figures["mu_effective"]])
            names = ("loss", "ntp", "mixup", "mu_effective")
            found[-1] += [[line[name] for name in names] for line in metrics_of(place)] if world.is_main else []
        assert found[0] == found[1]
        assert found[0][0] > 0
        assert moved == [moving, moving]


def test_mu_is_that_of_the_plans_that_mix(tmp_path):
    check_apart(World(), str(tmp_path))


@pytest.mark.slow
def test_mu_is_that_of_the_plans_that_mix_on_another_rank(tmp_path):
    on_ranks(check_apart, str(tmp_path))
