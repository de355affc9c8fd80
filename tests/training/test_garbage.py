"""The garbage collector during a stage: it runs after the first step and each fiftieth, and is on again at the end."""

import gc
import weakref
from typing import Any

import pytest

from sftmix.components import NTP
from sftmix.components.base import Callback, CallbackResult
from sftmix.ranks.world import World
from sftmix.training.garbage import EVERY
from sftmix.training.loop import train
from tests.toy import toy_stage
from tests.training.test_step import DATA, UNITS


class Cycle:
    """What only the collector frees."""

    def __init__(self) -> None:
        self.own = self


class Littering(Callback):
    """Makes garbage in each step, and notes after it whether the collector is on, and what is left.

    What is frozen is noted once: to count it takes longer than a step.
    """

    def __init__(self) -> None:
        self._left: list[weakref.ref] = []
        self._seen: list[tuple[bool, int]] = []
        self._frozen = 0

    def on_step_end(self, state) -> CallbackResult | None:
        alive = sum(one() is not None for one in self._left)
        self._seen.append((gc.isenabled(), alive))
        if len(self._seen) == EVERY:
            self._frozen = gc.get_freeze_count()
        self._left.append(weakref.ref(Cycle()))
        return None


class Fails(NTP):
    def loss(self, view, batch, plan):
        raise RuntimeError("a step that fails")


@pytest.mark.parametrize("on", [True, False])
def test_it_collects_after_the_first_step_and_each_fiftieth(tmp_path, on):
    automatic: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        automatic.append(len(littering._seen))

    littering, was_on = Littering(), gc.isenabled()
    gc.unfreeze()  # what tests/conftest.py has frozen
    try:
        (gc.enable if on else gc.disable)()
        gc.callbacks.append(note)
        train(toy_stage(tmp_path, [UNITS[:1]] * (EVERY + 3), data=DATA, callbacks=[littering]), World())
        gc.callbacks.remove(note)
        assert gc.isenabled() is on
        assert gc.get_freeze_count() == 0
    finally:
        (gc.enable if was_on else gc.disable)()
    assert littering._frozen > 0
    # on, and the cycles of earlier steps that are left; the 51st step is followed by a collection of all
    assert littering._seen[1:] == [(False, k) for k in range(EVERY)] + [(False, k) for k in range(2)]
    assert {step for step in automatic if 1 < step < EVERY + 3} == {EVERY + 1}


def test_it_is_on_again_after_an_error(tmp_path):
    gc.unfreeze()
    with pytest.raises(RuntimeError, match="a step that fails"):
        train(toy_stage(tmp_path, [UNITS[:1]], data=DATA, objective=Fails()), World())
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_a_program_has_frozen_stays_frozen_and_nothing_else_is(tmp_path):
    before = Cycle()
    gc.freeze()
    after = Cycle()
    train(toy_stage(tmp_path, [UNITS[:1]] * 2, data=DATA), World())
    collected = {id(one) for one in gc.get_objects()}
    assert (id(before) in collected, id(after) in collected) == (False, True)
