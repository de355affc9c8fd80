"""LossSpikeGuard: which step ends a run, that a resume changes nothing of it, and what may be done then."""

import pytest

from sftmix.batches.order import Slot
from sftmix.components import Perturbation, StageState
from sftmix.disk.files import steps_in
from sftmix.options import CheckpointOptions
from sftmix.ranks.world import World
from sftmix.testing import check_callback
from sftmix.training.loop import train
from sftmix.words.errors import NonFiniteError
from tests.components.examples import LossSpikeGuard
from tests.toy import metrics_of, toy_rows, toy_stage

DATA = toy_rows([(3, 5), (7, 2)])


def asked(guard, losses):
    guard.on_stage_start(StageState("train", 0, 100, 0))
    states = (StageState("train", step, 100, 0, {"loss": loss}) for step, loss in enumerate(losses, start=1))
    return next((state.step for state in states if spikes(guard, state)), None)


def spikes(guard, state):
    try:
        guard.on_step_end(state)
    except NonFiniteError:
        return True
    return False


NAN = float("nan")


@pytest.mark.parametrize(
    ("losses", "factor", "window", "step"),
    [
        ([1.0, 1.0, 2.0], 2.0, 2, None),
        ([1.0, 1.0, 2.01], 2.0, 2, 3),
        ([1.0, 9.0, 9.0, 9.0], 2.0, 2, None),
        ([9.0, 1.0, 1.0, 1.0, 3.1], 3.0, 3, 5),
        ([1.0, 1.0, NAN, NAN, 2.0, 5.0], 2.0, 3, 6),
        ([1.0, NAN, 9.0], 2.0, 2, None),
    ],
)
def test_the_first_loss_above_so_many_medians_ends_the_run(losses, factor, window, step):
    assert asked(LossSpikeGuard(factor=factor, window=window), losses) == step


def test_each_stage_has_its_own_losses():
    guard = LossSpikeGuard(factor=2.0, window=2)
    assert asked(guard, [1.0, 1.0]) is None
    assert asked(guard, [9.0, 9.0]) is None
    check_callback(guard)


class Leap(Perturbation):
    """Lets the loss leap in one step (from 0)."""

    def __init__(self, *, at: int):
        self.at = at

    def embeddings(self, e, mask, *, ids, step, seed):
        return e.flip(-1) if step == self.at else e


AT = 9
"""The leap: step 10."""


def train_to_a_leap(place, steps, *callbacks):
    given = {"perturbation": Leap(at=AT), "checkpoint": CheckpointOptions(every=4), "callbacks": callbacks}
    options = {"learning_rate": 0.03}
    train(toy_stage(place, [[(Slot(0),), (Slot(1),)]] * steps, data=DATA, options=options, **given), World())


@pytest.mark.slow
def test_a_spike_ends_the_run_resumed_or_not_and_leaves_the_last_checkpoint(tmp_path, capsys):
    told = r"train: step 10 has a loss of [\d.]+, more than 1.5 times the median [\d.]+ of the 6 steps before it"
    with pytest.raises(NonFiniteError, match=told) as whole:
        train_to_a_leap(tmp_path / "whole", 12, LossSpikeGuard(factor=1.5, window=6))
    assert steps_in(tmp_path / "whole" / "checkpoints") == [8, 4]
    train_to_a_leap(tmp_path / "cut", 8)  # it knows the losses before it came, too
    for _ in range(2):
        with pytest.raises(NonFiniteError) as again:
            train_to_a_leap(tmp_path / "cut", 12, LossSpikeGuard(factor=1.5, window=6))
        assert str(again.value) == str(whole.value)
    assert "resuming after step 8" in capsys.readouterr().out
    train_to_a_leap(tmp_path / "cut", 12)
    assert len(metrics_of(tmp_path / "cut")) == 12
