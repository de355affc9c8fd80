"""Checkpoints that a thread writes while the training goes on, as on a GPU; here the class is told so."""

import errno
import json
import os
import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sftmix.batches.order import Slot
from sftmix.components import NTP, Callback, Need
from sftmix.disk.files import steps_in, verify_directory
from sftmix.options import CheckpointOptions
from sftmix.ranks import world as worlds
from sftmix.ranks.world import World
from sftmix.training import part
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.loop import train
from sftmix.words.errors import CheckpointError, NoSpaceError, Stopped
from tests.forked import ended, on_ranks
from tests.tiny import status
from tests.toy import Interrupt, metrics_of, toy_model, toy_stage
from tests.trained import DATA, Trained, assert_exact

WRITE = part.save_file


@pytest.fixture(autouse=True)
def _behind(monkeypatch) -> None:
    monkeypatch.setattr(CheckpointStore, "in_background", True)


class Slow:
    """In place of what writes the tensors: it waits until `enough()`, and fails if that does not come."""

    def __init__(self, enough: Callable[[], bool]) -> None:
        self.enough = enough

    def __call__(self, *what) -> None:
        waits = threading.Event()
        for _ in range(2000):
            if self.enough():
                return WRITE(*what)
            waits.wait(0.005)
        raise TimeoutError("the training did not go on")


def trained_model(steps: int = 1) -> Trained:
    return Trained(toy_model(dtype=torch.float32), steps=steps)


def stage(directory: Path, *callbacks: Callback, every: int = 2):
    return toy_stage(
        directory,
        [[(Slot(0),), (Slot(1),)], [(Slot(2),), (Slot(3),)]] * 3,
        data=DATA,
        model=toy_model(dtype=torch.float32),
        options={"learning_rate": 0.01},
        checkpoint=CheckpointOptions(every=every, keep=9),
        callbacks=list(callbacks),
    )


def test_what_is_written_is_the_state_of_its_step(tmp_path, monkeypatch):
    """Steps that are made meanwhile do not change it, and there is no checkpoint before all is on disk."""
    it, moved = trained_model(), threading.Event()
    monkeypatch.setattr(part, "save_file", Slow(moved.is_set))
    store, before = CheckpointStore(tmp_path, keep=1, world=World()), it.everything()
    store.save(1, it.wrapped, it.optimizer, {})
    for _ in range(3):
        it.step()
    store.finish(wait=False)
    assert store.steps() == []
    moved.set()
    store.finish()
    assert store.newest_valid() == 1
    other = trained_model(steps=2)
    store.load(1, other.wrapped, other.optimizer)
    assert_exact(other.everything(), before)
    assert not torch.equal(it.everything()["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.parametrize("behind", [True, False])
def test_tensors_are_in_memory_at_most_once_more(tmp_path, monkeypatch, behind):
    """A copy for the thread; on a CPU, where the training waits, none."""
    seen = list[set[int]]()
    monkeypatch.setattr(CheckpointStore, "in_background", behind)
    monkeypatch.setattr(part, "save_file", lambda tensors, *more: seen.append({x.data_ptr() for x in tensors.values()}))
    it, held = trained_model(), list[torch.Tensor]()
    held += it.wrapped.parameters()
    held += [x for state in it.optimizer.state.values() for x in state.values()]
    store = CheckpointStore(tmp_path, keep=1, world=World())
    with pytest.raises(CheckpointError, match="shard-00001"), store.finishing():  # which was not written
        store.save(1, it.wrapped, it.optimizer, {})
    (written,) = seen
    own = {x.data_ptr() for x in held}
    assert len(written) == len(own)
    assert not written & own if behind else written == own


def test_a_run_goes_on_while_it_is_saved_and_ends_the_same(tmp_path, monkeypatch):
    whole = full_weights(train(stage(tmp_path / "whole", every=0), World()).module)
    # Step 4 is written once step 5 is made.
    monkeypatch.setattr(part, "save_file", Slow(lambda: len(metrics_of(tmp_path / "slow")) >= 5))
    assert_exact(whole, full_weights(train(stage(tmp_path / "slow", every=4), World()).module))
    saved = tmp_path / "slow" / "checkpoints"
    assert steps_in(saved) == [6, 4]
    assert [verify_directory(path, within=saved.parent) for path in saved.iterdir()] == [None, None]


class Remembers(Callback):
    """A callback that may stop, and keeps the loss of each step."""

    gives = frozenset({Need.STOP})

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step_end(self, state):
        self.losses.append(state.metrics["loss"])


class Counts(NTP):
    """An objective whose state is a list that grows."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def loss(self, view, batch, plan):
        self.sizes.append(len(batch.labels))
        return super().loss(view, batch, plan)

    def state_dict(self):
        return {"sizes": self.sizes}

    def load_state_dict(self, state):
        self.sizes = list(state["sizes"])


def test_lists_of_components_are_written_as_they_were_after_the_step(tmp_path, monkeypatch):
    """On one GPU they had what was added while the thread wrote: a resume saw those steps twice."""
    kept = []
    for behind in (False, True):
        monkeypatch.setattr(CheckpointStore, "in_background", behind)
        place = tmp_path / str(behind)
        train(replace(stage(place, Remembers()), objective=Counts()), World())
        saved = sorted((place / "checkpoints").glob("*/state.json"))
        kept.append([json.loads(path.read_text())["callbacks"] for path in saved])
    assert kept[0] == kept[1]
    assert [len(callback["losses"]) for ((callback, _),) in kept[0]] == [2, 4, 6]


class FailsAfter(Callback):
    """An error of a callback after a step."""

    gives = frozenset()

    def on_step_end(self, state):
        if state.step == 3:
            raise RuntimeError("of a callback")


@pytest.mark.parametrize(("callback", "error"), [(FailsAfter(), RuntimeError), (Interrupt(step=3), Stopped)])
def test_an_error_and_a_signal_wait_for_the_save_under_way(tmp_path, monkeypatch, callback, error):
    saved, place = tmp_path / "checkpoints", threading.Event()
    monkeypatch.setattr(part, "save_file", Slow(lambda: place.wait(0.3) or True))
    with pytest.raises(error):
        train(stage(tmp_path, callback), World())
    assert steps_in(saved) == ([2] if error is RuntimeError else [3, 2])
    assert not list(saved.glob(".tmp-*"))
    resumed = train(stage(tmp_path), World())
    monkeypatch.undo()
    assert_exact(full_weights(resumed.module), full_weights(train(stage(tmp_path / "whole"), World()).module))


@pytest.mark.parametrize(
    ("number", "expected", "message"),
    [
        (errno.ENOSPC, NoSpaceError, r"no space left to write .*step-00000004: [\d,]+ bytes are needed"),
        (errno.EIO, CheckpointError, r"step-00000004 cannot be written \(OSError: .*; the checkpoints before are"),
    ],
)
def test_an_error_of_the_thread_ends_the_run_as_if_it_were_its_own(tmp_path, monkeypatch, number, expected, message):
    failing = iter([None, number])

    def writes(*what) -> None:
        if (code := next(failing)) is not None:
            raise OSError(code, os.strerror(code))
        WRITE(*what)

    monkeypatch.setattr(part, "save_file", writes)
    with pytest.raises(expected, match=message):
        train(stage(tmp_path), World())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def in_background() -> None:
    CheckpointStore.in_background = True  # type: ignore[assignment,method-assign]
    worlds.PATIENCE = 0.1  # how long a rank's error waits for the same one of rank 0


def one_rank_cannot_write(world: World, path: str) -> None:
    in_background()
    it = Trained(toy_model(dtype=torch.float32), steps=1, world=world, parallel="fsdp")
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # writes fail with EFBIG
    store = CheckpointStore(Path(path), keep=1, world=world)
    store.save(1, it.wrapped, it.optimizer, {})
    it.step()  # with collectives of its own
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be written \(.*File too large"):
        store.finish()
    assert list(Path(path).iterdir()) == []


def a_signal_to_one_rank(world: World, path: str) -> None:
    """While the save of its step is under way on both."""
    in_background()
    waits = threading.Event()
    part.save_file = lambda *what: (waits.wait(0.3), WRITE(*what))
    with pytest.raises(Stopped):
        train(stage(Path(path), Interrupt(step=2 if world.rank else -1)), world)
    world.barrier()
    assert steps_in(Path(path) / "checkpoints") == [2]


REFUSES = '''
import torch.distributed as dist
from sftmix.components import NTP
from sftmix.words.errors import ConfigError

class Refuses(NTP):
    """On rank 1 the third loss is refused."""

    calls = 0

    def loss(self, view, batch, plan):
        self.calls += 1
        if self.calls == 3 and dist.get_rank() == 1:
            raise ConfigError("a batch of one rank")
        return super().loss(view, batch, plan)
'''


@pytest.mark.slow
def test_an_error_of_one_rank_is_raised_while_a_save_is_under_way(tiny, tmp_path):
    """It waited until training.timeout for the other rank, which was in a collective of the step.

    Its words were lost.
    """
    (tmp_path / "refusing.py").write_text(REFUSES)
    words = ["run", *tiny.bare, "--objective", "refusing.Refuses", "--splitter", "RandomSplit", "--out", "run"]
    words += ["--training.parallel", "ddp", "--checkpoint.every", "1", "--training.timeout", "45"]
    it = ended(words, cwd=tmp_path, faults=[in_background] * 2)
    assert status(tmp_path / "run")["message"] == "RankError: rank 1: ConfigError: a batch of one rank", it.printed


@pytest.mark.long
@pytest.mark.slow
def test_a_signal_to_one_rank_waits_for_the_threads_of_all(tmp_path):
    on_ranks(a_signal_to_one_rank, str(tmp_path))


@pytest.mark.long
@pytest.mark.slow
def test_what_the_thread_of_one_rank_cannot_write_ends_every_rank(tmp_path):
    on_ranks(one_rank_cannot_write, str(tmp_path))
