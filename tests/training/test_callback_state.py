"""State of callbacks that may stop: a resume has it as the run that was not killed, or the run ends at once."""

from datetime import date
from pathlib import Path

import numpy as np
import pytest

from sftmix.batches.order import Slot
from sftmix.components import Callback, CallbackResult
from sftmix.options import CheckpointOptions
from sftmix.ranks.world import World
from sftmix.training.loop import train
from sftmix.words.errors import ConfigError, Stopped
from tests.forked import on_ranks
from tests.toy import Interrupt, toy_stage
from tests.trained import DATA

BATCHES = [[(Slot(0),), (Slot(1),)], [(Slot(2),), (Slot(3),)]] * 3


class Counts(Callback):
    """Stops at the fifth step that it has counted itself, in several forms; ranks may count by other numbers."""

    def __init__(self, *, by: int = 1) -> None:
        self.by, self.seen, self.figures = by, 0, {"steps": [], "worst": float("nan")}
        self._watch = {0}

    def on_step_end(self, state):
        self.seen += self.by
        self.figures["steps"].append(state.step)
        self._watch.add(state.step)
        return CallbackResult(stop=self.seen == 5 * self.by)


class Keeps(Callback):
    """Keeps one value from the first step on."""

    def __init__(self, value) -> None:
        self.value = value

    def on_step_end(self, state):
        self.kept = getattr(self, "kept", self.value)


class Watches(Keeps):
    """The same, which never stops."""

    gives = frozenset()


def stage_of(place, *callbacks, every=2):
    return toy_stage(place, BATCHES, data=DATA, callbacks=callbacks, checkpoint=CheckpointOptions(every=every))


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_resume_counts_on(tmp_path, stop):
    with pytest.raises(Stopped):
        train(stage_of(tmp_path, Counts(), Interrupt(step=stop)), World())
    again = Counts()
    figures = train(stage_of(tmp_path, again), World()).figures
    assert (figures["steps"], figures["stopped_by"], again.seen) == (5, "Counts", 5)
    assert again.figures["steps"] == [1, 2, 3, 4, 5]
    assert again.by == 1


@pytest.mark.parametrize(
    "value", [{1, 2}, (1, 2), date(2026, 1, 1), {1: 2.0}, b"x", object()], ids=lambda value: type(value).__name__
)
def test_what_would_not_come_back_ends_the_run_after_its_first_step(tmp_path, value):
    with pytest.raises(ConfigError, match=r"callbacks: no checkpoint would bring back Keeps\.kept, so a resumed run"):
        train(stage_of(tmp_path, Keeps(value), every=0), World())
    assert train(stage_of(tmp_path, Watches(value)), World()).figures["steps"] == 6


class Worst:
    """Of an object, and of a long array, the text is the same after a change."""

    def __init__(self) -> None:
        self.of = 0


class Watcher(Callback):
    """Changes in place what it keeps, which it has from the start."""

    def __init__(self) -> None:
        self.helper, self.array, self.listed = Worst(), np.zeros(2000), [{"a": Worst()}]

    def on_step_end(self, state):
        self.helper.of += 1


class OfLists(Watcher):
    def on_step_end(self, state):
        self.listed[0]["a"].of += 1


class OfArrays(Watcher):
    def on_step_end(self, state):
        self.array[1000] += 1


@pytest.mark.parametrize(("callback", "key"), [(Watcher(), "helper"), (OfArrays(), "array"), (OfLists(), "listed")])
def test_what_changes_in_place_is_seen(tmp_path, callback, key):
    with pytest.raises(ConfigError, match=rf"no checkpoint would bring back {type(callback).__name__}\.{key}"):
        train(stage_of(tmp_path, callback, every=0), World())


@pytest.mark.parametrize("value", [{"a": [1, 0.5, None, True, "x"]}, float("nan"), [], 1e300], ids=repr)
def test_values_of_json_come_back(tmp_path, value):
    with pytest.raises(Stopped):
        train(stage_of(tmp_path, Keeps(value), Interrupt(step=5)), World())
    again = Keeps("another")
    train(stage_of(tmp_path, again), World())
    assert repr(again.kept) == repr(value)


def test_another_order_than_that_of_the_last_step_is_refused(tmp_path):
    """As after a release, or an edit that no hash sees, that orders the examples in another way."""
    with pytest.raises(Stopped):
        train(stage_of(tmp_path, Interrupt(step=4)), World())
    turned = [batch[::-1] for batch in BATCHES]
    given = {"data": DATA, "checkpoint": CheckpointOptions(every=2)}
    with pytest.raises(ConfigError, match=r"train: step 4 had other examples \(`rows` in metrics\.jsonl\)"):
        train(toy_stage(tmp_path, turned, **given), World())
    assert train(stage_of(tmp_path), World()).figures["steps"] == 6


def each_rank(world: World, path: str) -> None:
    own = Counts(by=world.rank + 1)
    with pytest.raises(Stopped):
        train(stage_of(Path(path), own, Interrupt(step=2)), world)
    again = Counts(by=world.rank + 1)
    train(stage_of(Path(path), again), world)
    assert again.seen == 5 * (world.rank + 1)


@pytest.mark.slow
def test_each_rank_gets_its_own_state(tmp_path):
    on_ranks(each_rank, str(tmp_path))
