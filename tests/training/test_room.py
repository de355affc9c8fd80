"""Room for the checkpoints to come: by an estimate before the first, by the size of the newest one after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftmix.common.errors import NoSpaceError
from sftmix.common.world import World
from sftmix.training.best import BestWeights
from sftmix.training.checkpoint import CheckpointStore
from sftmix.training.room import bytes_to_come, check_room_for_checkpoints
from tests.toy import toy_model
from tests.trained import Trained

TOO_MANY = 1e15
"""Bytes of state per number for which no disk has room."""


@pytest.fixture(scope="module")
def it() -> Trained:
    return Trained(toy_model(), steps=1)


def standing(place: Path, it: Trained, *, keep: int, steps: int) -> CheckpointStore:
    store = CheckpointStore(place / "checkpoints", keep=keep, world=World())
    for step in range(1, steps + 1):
        store.save(step, it.wrapped, it.optimizer, {})
    return store


@pytest.mark.parametrize(("saves", "count"), [(1, 1), (2, 2), (3, 3), (9, 3)])
@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_first_checkpoints_are_estimated(tmp_path, it, saves, count, best):
    numbers = sum(p.numel() for p in it.wrapped.parameters())  # of 8 bytes each
    found = bytes_to_come(
        standing(tmp_path, it, keep=2, steps=0), it.wrapped, state_bytes=16, saves=saves, best_copies=best
    )
    assert found == pytest.approx(1.2 * numbers * (24 * count + 8 * best), abs=4)


@pytest.mark.parametrize(("steps", "count"), [(1, 2), (2, 1)])
def test_those_after_them_take_what_the_newest_takes(tmp_path, it, steps, count):
    store = standing(tmp_path, it, keep=2, steps=steps)
    newest = sum(file.stat().st_size for file in store.path(steps).iterdir())
    found = bytes_to_come(store, it.wrapped, state_bytes=TOO_MANY, saves=9, best_copies=0)
    assert found == count * newest


def test_the_size_of_a_damaged_checkpoint_says_nothing(tmp_path, it):
    store = standing(tmp_path, it, keep=2, steps=2)
    for file in store.path(2).iterdir():
        file.unlink()
    with pytest.warns(UserWarning, match="skipping"):
        assert store.newest_valid() == 1
    newest = sum(file.stat().st_size for file in store.path(1).iterdir())
    assert bytes_to_come(store, it.wrapped, state_bytes=16, saves=9, best_copies=0) == newest


def test_two_copies_of_the_best_weights_stand_at_one_time(tmp_path, it):
    """The second is written beside the first, which then goes; from then on one more has to fit."""
    best = BestWeights(tmp_path, World())
    counted = [best.copies_to_come()]
    for step, nll in enumerate((3.0, 2.0), start=1):
        best.offer(step, it.wrapped, {"eval_nll": nll})
        counted.append(best.copies_to_come())
        assert len(list((tmp_path / "best").iterdir())) == 1
    assert counted == [2, 1, 1]


def test_too_little_room_is_refused_with_the_bytes(tmp_path, it):
    more = {"state_bytes": TOO_MANY, "saves": 1, "best_copies": 0}
    store = standing(tmp_path, it, keep=2, steps=0)
    needed = bytes_to_come(store, it.wrapped, **more)
    with pytest.raises(NoSpaceError, match=f"too little room for the checkpoints to come in .*: {needed:,} bytes are"):
        check_room_for_checkpoints(store, it.wrapped, **more)
    check_room_for_checkpoints(standing(tmp_path, it, keep=2, steps=1), it.wrapped, **more)
