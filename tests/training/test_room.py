"""Room for the checkpoints to come, by an estimate."""

from pathlib import Path

import pytest

from sftmix.batches.order import Slot
from sftmix.common.errors import NoSpaceError
from sftmix.common.world import World
from sftmix.components import AdamW
from sftmix.options import CheckpointOptions
from sftmix.training.checkpoint import BestWeights, CheckpointStore
from sftmix.training.loop import train
from tests.toy import toy_model, toy_rows, toy_stage
from tests.trained import Trained

TOO_MANY = 1e15
"""Bytes of state per number for which no disk has room."""


class Huge(AdamW):
    state_bytes = TOO_MANY


@pytest.fixture(scope="module")
def it() -> Trained:
    return Trained(toy_model(), steps=1)


def standing(place: Path, it: Trained, *, steps: int) -> CheckpointStore:
    store = CheckpointStore(place / "checkpoints", keep=2, world=World())
    for step in range(1, steps + 1):
        store.save(step, it.wrapped, it.optimizer, {})
    return store


@pytest.mark.parametrize(
    ("steps", "saves", "count"), [(0, 1, 1), (0, 2, 2), (0, 3, 3), (0, 9, 3), (1, 9, 2), (2, 9, 1)]
)
def test_the_checkpoints_to_come_are_estimated(tmp_path, it, steps, saves, count):
    numbers = sum(p.numel() for p in it.wrapped.parameters())  # of 8 bytes each
    needed = standing(tmp_path, it, steps=steps).bytes_to_come(it.wrapped, state_bytes=16, saves=saves)
    assert needed == pytest.approx(1.2 * numbers * 24 * count, abs=4)


def test_two_copies_of_the_best_weights_stand_at_one_time(tmp_path, it):
    """The second is written beside the first, which then goes; from then on one more has to fit."""
    best, stored = BestWeights(tmp_path, World()), 8 * sum(p.numel() for p in it.wrapped.parameters())
    needed = []
    for step, nll in enumerate((4.0, 3.0, 2.0)):
        needed.append(best.store.bytes_to_come(it.wrapped, state_bytes=0, saves=2))
        best.offer(step, it.wrapped, {"eval_nll": nll})
        assert len(list((tmp_path / "best").iterdir())) == 1
    assert needed == pytest.approx([2.4 * stored, 1.2 * stored, 1.2 * stored], abs=2)


def test_too_little_room_is_refused_with_the_bytes(tmp_path):
    """Before the first step."""
    batches, kept = [[(Slot(0),)]], CheckpointOptions(every=1)
    stage = toy_stage(tmp_path, batches, data=toy_rows([(3, 5)]), checkpoint=kept, optimizer=Huge())
    with pytest.raises(NoSpaceError, match=r"too little room for the checkpoints to come in .*: [\d,]+ bytes are"):
        train(stage, World())
    assert not (tmp_path / "metrics.jsonl").exists()
