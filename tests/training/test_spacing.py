"""When a stage saves a checkpoint: by steps, by the clock, and by what the last one cost, on all ranks alike."""

import itertools
import time
from pathlib import Path

import pytest
import torch

from sftmix.batches.order import Slot
from sftmix.components import Callback
from sftmix.disk.files import steps_in
from sftmix.options import CheckpointOptions
from sftmix.ranks.world import World
from sftmix.training import spacing
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.loop import train
from sftmix.training.spacing import Spacing
from tests.forked import on_ranks
from tests.toy import toy_model, toy_stage
from tests.trained import DATA, assert_exact

BY_CLOCK = CheckpointOptions(every_seconds=1e-9, keep=99)


@pytest.mark.parametrize(
    ("options", "total", "steps", "most"),
    [
        ({}, 12, [12], 12),
        ({}, 50, [20, 40, 50], 50),
        ({}, 3000, [750, 1500, 2250, 3000], 3000),
        ({"every": 7}, 20, [7, 14, 20], 3),
        ({"every": 0}, 20, [], 0),
        ({"every_seconds": 60.0}, 20, [20], 20),
    ],
)
def test_the_steps_that_are_saved_whatever_the_clock_says(options, total, steps, most):
    """And how many there may be, for which there must be room."""
    of_stage = Spacing(CheckpointOptions(**options), total)
    assert [step for step in range(1, total + 1) if of_stage.due(step)] == steps
    assert of_stage.most(0) == most


def test_a_stage_that_goes_on_has_room_for_all_that_are_due():
    """Wherever it goes on from: a signal saves any step."""
    for every, total in itertools.product(range(1, 8), range(1, 20)):
        of_stage = Spacing(CheckpointOptions(every=every), total)
        for step in range(total):
            assert of_stage.most(step) == sum(map(of_stage.due, range(step + 1, total + 1)))


@pytest.mark.parametrize(
    ("options", "cost", "seconds"),
    [
        ({}, 0.0, 120.0),  # not known yet
        ({}, 1.0, 120.0),
        ({}, 30.0, 1500.0),  # 30 s are 2% of it
        ({"every_seconds": 60.0}, 30.0, 60.0),
        ({"every": 7}, 0.0, None),
        ({"every": 0}, 0.0, None),
    ],
)
def test_the_seconds_after_which_one_is_late(monkeypatch, options, cost, seconds):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    of_stage = Spacing(CheckpointOptions(**options), 100)
    of_stage.since = 6000.0
    for after, late in ((0.0, False), (0.99 * (seconds or 1.0), False), (seconds or 1e9, seconds is not None)):
        now[0] = 6000.0 + after
        assert of_stage.late(cost) is late, after


def moving(directory: Path, options: CheckpointOptions, *more: Callback, steps: int = 5, world: World | None = None):
    """Weights after steps that move them, and the steps that were saved on the way."""
    stage = toy_stage(
        directory,
        [[(Slot(0),), (Slot(1),)], [(Slot(2),), (Slot(3),)]] * steps,
        data=DATA,
        model=toy_model(dtype=torch.float32),
        options={"learning_rate": 0.01},
        checkpoint=options,
        callbacks=list(more),
    )
    done = train(stage, world or World())
    return full_weights(done.module), sorted(steps_in(directory / "checkpoints"))


@pytest.mark.slow
def test_checkpoints_by_the_clock_change_no_number_and_the_end_has_one(tmp_path):
    none, _ = moving(tmp_path / "none", CheckpointOptions(every=0))
    clocked, saved = moving(tmp_path / "clocked", BY_CLOCK)
    assert saved == list(range(1, 11))
    assert_exact(none, clocked)
    slow, saved = moving(tmp_path / "slow", CheckpointOptions(every_seconds=1e6))
    assert saved == [10]
    assert_exact(none, slow)


class Ticks(Callback):
    """A second for each step."""

    def __init__(self) -> None:
        self.now = 0.0

    def on_step_end(self, state) -> None:
        self.now += 1.0


@pytest.mark.parametrize(("cost", "steps"), [(0.0, [3, 6, 9, 10]), (0.1, [5, 10])])
def test_the_clock_counts_from_the_last_one(tmp_path, monkeypatch, cost, steps):
    """By what that one took, if it took long: 0.1 s are 2% of 5 s."""
    ticks = Ticks()
    monkeypatch.setattr(time, "monotonic", lambda: ticks.now)
    monkeypatch.setattr(spacing, "LEAST_SECONDS", 2.5)
    monkeypatch.setattr(CheckpointStore, "seconds", property(lambda store: cost, lambda store, took: None))
    assert moving(tmp_path, CheckpointOptions(keep=99), ticks)[1] == steps


def clocks_that_differ(world: World, place: str) -> None:
    """The clock of rank 1 is an hour ahead each time it is read."""
    if world.rank == 1:
        hours = iter(range(10**6))
        time.monotonic = lambda: 3600.0 * next(hours)
    _, saved = moving(Path(place) / "auto", CheckpointOptions(), steps=3, world=world)
    assert saved == [6]
    _, saved = moving(Path(place) / "clocked", BY_CLOCK, steps=3, world=world)
    assert saved == list(range(1, 7))


@pytest.mark.long
@pytest.mark.slow
def test_the_clock_of_the_first_rank_decides(tmp_path):
    on_ranks(clocks_that_differ, str(tmp_path))
