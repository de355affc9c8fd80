"""F1 and F21: kills at random moments of every stage, and the control that what continues a run is needed for it."""

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.faults.mines import KillAt
from tests.faults.runs import PHASES, assert_little_is_lost, assert_same, from_split, leftovers, long, steps, words_of
from tests.forked import SIGKILLED, done, ended
from tests.tiny import Tiny

AFTER_SPLIT = ("training", "measuring")
LONGEST = 1.0
"""Seconds after the beginning of a phase within which the kill falls; a run that is over by then is tried anew."""


def recovers(small: Tiny, whole: Path, place: Path, phase: str, after: float) -> None:
    """From a SIGKILL so many seconds after a phase began, or fewer, where it was over by then."""
    code, run = 0, place / "run"
    while code == 0 and after > LONGEST / 1000:
        shutil.rmtree(run, ignore_errors=True)
        if phase in AFTER_SPLIT:
            from_split(whole, place)
        code = ended(words_of(small), cwd=place, faults=[replace(PHASES[phase], after=after)]).code
        after /= 2
    assert code == SIGKILLED, phase
    assert_little_is_lost(run)
    done(words_of(small), cwd=place)
    assert_same(run, whole)
    assert leftovers(run) == []


def test_a_kill_while_the_model_card_is_written(small, whole, tmp_path):
    """All stages are done by then, so that none of them tidies the model's directory."""
    from_split(whole, tmp_path)
    mine = KillAt("train/model/.tmp-README.md", 3)
    assert ended(words_of(small), cwd=tmp_path, faults=[mine]).code == SIGKILLED
    assert leftovers(tmp_path / "run")
    done(words_of(small), cwd=tmp_path)
    assert leftovers(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "kills"),
    [("scoring", 1), ("measuring", 1), *(pytest.param(phase, 5, marks=pytest.mark.long) for phase in PHASES)],
)
def test_random_kills_in_each_stage(small, whole, tmp_path, phase, kills):
    """Kills in training that .ci/run makes: tests/distributed/test_equivalence.py."""
    chance = random.Random(f"kills {phase}")
    for number in range(kills):
        place = tmp_path / str(number)
        place.mkdir()
        recovers(small, whole, place, phase, 0.02 if kills == 1 else chance.uniform(0, LONGEST))


@long
@pytest.mark.parametrize("phase", PHASES)
def test_a_random_kill_of_two_ranks_in_each_stage(small, whole_of_two, tmp_path, phase):
    words, run = [*words_of(small), "--training.parallel", "fsdp"], tmp_path / "run"
    if phase in AFTER_SPLIT:
        from_split(whole_of_two, tmp_path)
    after = 0.0 if phase == "measuring" else random.Random(f"two {phase}").uniform(0, 0.3)
    it = ended(words, cwd=tmp_path, faults=[None, replace(PHASES[phase], after=after)])
    assert it.codes[1] == SIGKILLED, it.printed
    assert_little_is_lost(run)
    done(words, cwd=tmp_path, ranks=2)
    assert_same(run, whole_of_two)
    assert leftovers(run) == []


# ------------------------------------------------------------------------------------------------- negative controls


@dataclass(frozen=True)
class Forgets:
    """A build that begins from 0 again, after a resume, where it should go on."""

    what: str

    def __call__(self) -> None:
        from sftmix.batches.order import TrainingOrder
        from sftmix.training import checkpoint, loop, step

        first, load = [0], checkpoint.CheckpointStore.load
        batch, rate, seed = TrainingOrder.batch, step.learning_rate, step.stable_hash

        def loads(store, number, wrapped, optimizer):
            state = load(store, number, wrapped, None if self.what == "optimizer" else optimizer)
            first[0] = state["step"]
            return state

        def seeded(*parts):
            return seed(parts[0], parts[1], parts[2] - first[0], *parts[3:]) if parts[1] == "dropout" else seed(*parts)

        loop.CheckpointStore.load = loads
        if self.what == "order":
            TrainingOrder.batch = lambda order, number: batch(order, max(0, number - first[0]))
        elif self.what == "schedule":
            step.learning_rate = lambda number, total, options: rate(number - first[0], total, options)
        elif self.what == "random numbers":
            step.stable_hash = seeded


@pytest.fixture(scope="module")
def interrupted(small, whole, tmp_path_factory) -> dict[int, Path]:
    """Step of the last checkpoint -> a run that was killed in the save after it."""
    runs = {}
    for last in (3, 6, 9):
        place = tmp_path_factory.mktemp(f"after-{last}")
        from_split(whole, place)
        mine = KillAt(f"train/checkpoints/.tmp-step-{last + 3:08d}", 1)
        assert ended(words_of(small), cwd=place, faults=[mine]).code == SIGKILLED
        runs[last] = place / "run"
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        "random numbers",
        *(pytest.param(what, marks=pytest.mark.long) for what in (None, "schedule", "order", "optimizer")),
    ],
)
def test_a_resume_that_forgets_is_seen(small, whole, interrupted, tmp_path, what):
    for last, killed in interrupted.items():
        place = tmp_path / str(last)
        shutil.copytree(killed, place / "run")
        assert ended(words_of(small), cwd=place, faults=[what and Forgets(what)]).code == 0
        if what is None:
            assert_same(place / "run", whole)
            continue
        assert steps(place / "run")[:last] == steps(whole)[:last]
        with pytest.raises(AssertionError):
            assert_same(place / "run", whole)
