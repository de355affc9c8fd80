"""F1, F2, F12 and F21: kills at random moments of every stage, and at every file operation of a save, also where a
rename is no single step; and the control that what continues a run is needed for it.

The save of step 9 is the third one: it prunes the checkpoint of step 3, too. All runs of a save start from the same
directory, in which steps 3 and 6 are saved and the process was killed when it began the third save.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sftmix.disk.files import verify_directory
from tests.faults.mines import CopyingRename, Failing, KillAt, KillIn, Record
from tests.faults.runs import (
    PHASES,
    assert_little_is_lost,
    assert_same,
    checkpoints,
    from_split,
    goes_on,
    leftovers,
    long,
    steps,
    words_of,
)
from tests.forked import SIGKILLED, Fault, done, ended
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
    goes_on(words_of(small), place, whole)


def test_a_kill_while_the_model_card_is_written(small, whole, tmp_path):
    """All stages are done by then, so that none of them tidies the model's directory."""
    from_split(whole, tmp_path)
    mine = KillAt("train/model/.tmp-README.md", 3)
    assert ended(words_of(small), cwd=tmp_path, faults=[mine]).code == SIGKILLED
    assert leftovers(tmp_path / "run")
    goes_on(words_of(small), tmp_path, whole)


def test_a_kill_before_an_export_has_its_card(whole, tmp_path):
    """It is not there, and the same command makes it."""
    shutil.copytree(whole, tmp_path / "run")
    words = ["export", "run", "--to", "models/mine"]
    assert ended(words, cwd=tmp_path, faults=[KillAt("/.tmp-README.md", 1)]).code == SIGKILLED
    assert [path.name[:10] for path in (tmp_path / "models").iterdir()] == [".tmp-mine."]
    done(words, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]
    assert (tmp_path / "models" / "mine" / "README.md").exists()


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
    goes_on(words, tmp_path, whole_of_two, ranks=2)


@long
def test_kills_of_two_ranks_with_adapters(small, tmp_path):
    """In step 6 of 12 of the reference, and, after its last 9 steps, in step 6 of the training."""
    words = [*words_of(small), "--training.parallel", "fsdp", "--model.lora.r", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, killed):
        place.mkdir()
    done(words, cwd=whole, ranks=2)
    for call in (6, 9 + 6):
        it = ended(words, cwd=killed, faults=[None, KillIn("training/step.py", "train_step", call=call)])
        assert it.codes[1] == SIGKILLED, it.printed
        assert_little_is_lost(killed / "run")
    goes_on(words, killed, whole / "run", ranks=2)


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
            load(store, number, wrapped, None if self.what == "optimizer" else optimizer)
            first[0] = number

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
@pytest.mark.parametrize("what", ["random numbers", None, "schedule", "order", "optimizer"])
def test_a_resume_that_forgets_is_seen(small, whole, interrupted, tmp_path, what):
    for last, killed in interrupted.items():
        place = tmp_path / str(last)
        shutil.copytree(killed, place / "run")
        it = ended(words_of(small), cwd=place, faults=[what and Forgets(what)])
        if what == "order":  # the log has the hash of each step's rows
            assert (it.code, "orders them in another way" in it.printed) == (2, True)
            continue
        assert it.code == 0
        if what is None:
            assert_same(place / "run", whole)
            continue
        assert steps(place / "run")[:last] == steps(whole)[:last]
        with pytest.raises(AssertionError):
            assert_same(place / "run", whole)


SAVES = "train/checkpoints"
KEEP = 2


@dataclass(frozen=True)
class Start:
    """A directory killed in its third save, the words that continue it, and the file operations from there on."""

    words: list[str]
    run: Path
    whole: Path
    operations: list[list[str]]
    """Of each rank, up to the end of the third save."""

    def copy(self, place: Path) -> Path:
        shutil.copytree(self.run, place / "run")
        return place / "run"


def start_of(small: Tiny, whole: Path, place: Path, ranks: int, *more: str) -> Start:
    words = words_of(small, *more)
    for name in ("start", "recorded"):
        (place / name).mkdir()
    from_split(whole, place / "start")
    mine = KillAt(f"{SAVES}/.tmp-step-00000009", 1)
    assert ended(words, cwd=place / "start", faults=[mine, *[None] * (ranks - 1)]).code == SIGKILLED
    shutil.copytree(place / "start" / "run", place / "recorded" / "run")
    records = [Record(SAVES, str(place / f"operations-{rank}")) for rank in range(ranks)]
    assert ended(words, cwd=place / "recorded", faults=records).codes == [0] * ranks
    assert_same(place / "recorded" / "run", whole)
    operations = [(place / f"operations-{rank}").read_text().splitlines() for rank in range(ranks)]
    until = ["step-00000012" in line for line in operations[0]].index(True)
    found = [operations[0][: until - 1]]  # the last is the next save's own mkdir of the directory of all
    found += [[line for line in each if "step-00000012" not in line] for each in operations[1:]]
    return Start(words, place / "start" / "run", whole, found)


@pytest.fixture(scope="session")
def one(small, whole, tmp_path_factory) -> Start:
    return start_of(small, whole, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="session")
def two(small, whole_of_two, tmp_path_factory) -> Start:
    return start_of(small, whole_of_two, tmp_path_factory.mktemp("two"), 2, "--training.parallel", "fsdp")


def assert_whole_checkpoints(run: Path, *, more: int = 1) -> None:
    """Whatever a kill left: a valid checkpoint of an earlier save is there, and not more than so many beyond `keep`."""
    named = [name for name in checkpoints(run) if name.startswith("step-")]
    valid = [name for name in named if verify_directory(run / SAVES / name, within=(run / SAVES).parent) is None]
    assert valid, checkpoints(run)
    assert len(checkpoints(run)) <= KEEP + more


def assert_recovers(start: Start, place: Path, ranks: int = 1) -> None:
    assert "train: resuming after step " in goes_on(start.words, place, start.whole, ranks=ranks)
    assert checkpoints(place / "run") == ["step-00000009", "step-00000012"]


def survives(start: Start, place: Path, faults: Sequence[Fault | None], *, more: int = 1) -> tuple[str, ...]:
    """A kill of the rank that has a mine, after which the run recovers; return the checkpoints that it left."""
    place.mkdir()
    run, rank = start.copy(place), next(rank for rank, fault in enumerate(faults) if fault)
    assert ended(start.words, cwd=place, faults=faults).codes[rank] == SIGKILLED, faults
    assert_whole_checkpoints(run, more=more)
    left = tuple(checkpoints(run))
    assert_recovers(start, place, ranks=len(faults))
    shutil.rmtree(place)
    return left


def spread(count: int, number: int) -> list[int]:
    """So many of the numbers from 1 to `count`, both ends among them."""
    return sorted({1 + round(i * (count - 1) / (number - 1)) for i in range(number)})


@pytest.mark.slow
def test_a_few_kills_in_one_save(one, tmp_path):
    """Each continues the one before, the last of them from after the rename."""
    run = one.copy(tmp_path)
    renames = [n for n, line in enumerate(one.operations[0], 1) if line.startswith("os.rename")]
    assert len(renames) == 2  # the manifest, and then the directory
    for number in (renames[0] - 1, renames[1], len(one.operations[0])):
        assert ended(one.words, cwd=tmp_path, faults=[KillAt(SAVES, number)]).code == SIGKILLED
        assert_whole_checkpoints(run)
    assert_recovers(one, tmp_path)


@long
def test_every_operation_of_a_save(one, tmp_path):
    points = range(1, len(one.operations[0]) + 1)
    seen = {survives(one, tmp_path / str(number), [KillAt(SAVES, number)]) for number in points}
    assert len(seen) >= 4  # before the save, in it, after its rename, after it has pruned


@long
@pytest.mark.parametrize("rank", [0, 1])
def test_either_of_two_ranks_in_a_save(two, tmp_path, rank):
    for number in spread(len(two.operations[rank]), 8):
        survives(two, tmp_path / str(number), [KillAt(SAVES, number) if r == rank else None for r in (0, 1)])


@dataclass(frozen=True)
class KilledBehind:
    """Saves are written while the training goes on, as on a GPU; SIGKILL in that of step 9, two steps later.

    after  True: when the tensors are on disk, and nothing says yet that they are
    """

    after: bool

    def __call__(self) -> None:
        from sftmix.training import checkpoint, part

        checkpoint.CheckpointStore.in_background = True
        write = part.save_file

        def writes(tensors, file: Path, metadata) -> None:
            if "step-00000009" not in str(file):
                return write(tensors, file, metadata)
            if self.after:
                write(tensors, file, metadata)
            while len((file.parents[2] / "metrics.jsonl").read_text().splitlines()) < 11:
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGKILL)

        part.save_file = writes


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "after"),
    [(1, True), *(pytest.param(ranks, after, marks=pytest.mark.long) for ranks, after in [(1, False), (2, True)])],
)
def test_a_kill_while_a_save_is_written_and_the_training_goes_on(small, request, tmp_path, ranks, after):
    more = ("--training.parallel", "fsdp") if ranks > 1 else ()
    whole, words = request.getfixturevalue("whole_of_two" if ranks > 1 else "whole"), words_of(small, *more)
    run = from_split(whole, tmp_path)
    it = ended(words, cwd=tmp_path, faults=[KilledBehind(after)] * ranks)
    assert SIGKILLED in it.codes, it.printed
    assert len(steps(run)) >= 11
    assert [name for name in checkpoints(run) if name.startswith("step-")] == ["step-00000003", "step-00000006"]
    assert leftovers(run)
    assert "resuming after step 6 of 12" in goes_on(words, tmp_path, whole, ranks=ranks)


# ---------------------------------------------------------------------------------- a file system that is not atomic


@long
def test_every_operation_of_a_save_where_rename_copies_and_deletes(one, tmp_path):
    operations, run = tmp_path / "operations", one.copy(tmp_path)
    assert ended(one.words, cwd=tmp_path, faults=[CopyingRename(Record(SAVES, str(operations)))]).code == 0
    assert_same(run, one.whole)
    until = ["step-00000012" in line for line in operations.read_text().splitlines()].index(True)
    for number in spread(until - 1, 24):  # while it is copied, the new one is there twice
        survives(one, tmp_path / str(number), [CopyingRename(KillAt(SAVES, number))], more=2)


def fails(start: Start, place: Path, fault: Failing) -> bool:
    """A run with a failing file system, which must say so, lose nothing, and continue on a good one; or False."""
    place.mkdir()
    start.copy(place)
    it = ended(start.words, cwd=place, faults=[fault])
    if it.code == 0:
        return False
    assert it.code is not None
    assert fault.code in it.printed or "Errno" in it.printed
    assert [n for n, *_ in steps(place / "run")][-1] == 9  # the step of the save that failed
    assert_whole_checkpoints(place / "run")
    assert_recovers(start, place)
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("fsync", "EIO"),
        *(pytest.param("rename", code, marks=pytest.mark.long) for code in ("EEXIST", "EXDEV")),
    ],
)
def test_a_file_system_that_fails_is_not_said_to_have_saved(one, tmp_path, call, code):
    below = ".tmp-step-00000009" if call == "rename" else SAVES
    assert fails(one, tmp_path / "failing", Failing(call, code, below))


@long
def test_a_disk_that_fails_at_any_moment_of_a_save(one, tmp_path):
    """EIO from the n-th fsync of the save on, until one save has no so many: then the run gets through."""
    number = 1
    while fails(one, tmp_path / str(number), Failing("fsync", "EIO", "step-00000009", number)):
        number += 1
    assert number > 3  # shards, manifest, directory
