"""F1, F3, F4 and F5 under torchrun: two ranks and their launcher, killed or told to stop in every stage."""

import os
import pickle
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.agents import wait_until
from tests.distributed.test_launcher import gone
from tests.faults.mines import KillIn, everyone, launcher
from tests.faults.runs import (
    PHASES,
    assert_little_is_lost,
    assert_same,
    checkpoints,
    from_split,
    leftovers,
    steps,
    words_of,
)
from tests.forked import done
from tests.tiny import Tiny, contents, sftmix, status

pytestmark = [pytest.mark.slow, pytest.mark.long]

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
LAYS = """
import os, pickle
from pathlib import Path

if "RANK" in os.environ and not (me := Path(f"pid-{os.environ['RANK']}")).exists():  # no process that a rank starts
    me.write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        pickle.loads(Path("mine").read_bytes())()
"""
"""Python runs this first thing in every process of the job."""


class Job:
    """A run of two ranks under torchrun, with a mine in the second; `seconds` from the signal to the end of all."""

    def __init__(self, tiny: Tiny, place: Path, mine: KillIn) -> None:
        for name in ("pid-0", "pid-1", "signalled"):
            (place / name).unlink(missing_ok=True)
        (place / "sitecustomize.py").write_text(LAYS)
        (place / "mine").write_bytes(pickle.dumps(mine))
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = f"{place}{os.pathsep}{before}"
        try:
            it = sftmix(*sharing(tiny), ranks=2, cwd=place)  # returns when the last that can print is gone
        finally:
            os.environ["PYTHONPATH"] = before
        self.code, self.printed = it.returncode, it.stdout + it.stderr
        assert (place / "signalled").exists(), self.printed
        self.seconds = time.time() - float((place / "signalled").read_text())
        ranks = [int((place / f"pid-{rank}").read_text()) for rank in (0, 1)]
        # A killed process closes its files some time before it is gone, and a busy machine makes that longer.
        wait_until(lambda: all(map(gone, ranks)), 5)


def sharing(tiny: Tiny) -> list[str]:
    return [*words_of(tiny), "--training.parallel", "fsdp"]


def goes_on(tiny: Tiny, place: Path, whole: Path) -> None:
    """The same command on two ranks ends as the uninterrupted run."""
    done(sharing(tiny), cwd=place, ranks=2)
    assert_same(place / "run", whole)
    assert leftovers(place / "run") == []


def test_all_are_killed_in_every_stage(small, whole_of_two, tmp_path, record_property):
    """One run directory: each start goes on where the one before was killed, at a random moment of the next phase."""
    chance = random.Random("torchrun")
    for phase, mine in PHASES.items():
        longest = 0.0 if phase == "measuring" else 0.5
        job = Job(small, tmp_path, replace(mine, call=1, after=chance.uniform(0, longest), whom=everyone))
        assert job.code == -signal.SIGKILL, phase
        assert_little_is_lost(tmp_path / "run")
    goes_on(small, tmp_path, whole_of_two)
    record_property("F1", f"{len(PHASES)}/{len(PHASES)} kills of torchrun and two ranks, one in each of {list(PHASES)}")


IN_STEP_5 = KillIn("training/step.py", "train_step", call=5)


def test_one_rank_is_killed(small, whole_of_two, tmp_path, record_property):
    from_split(whole_of_two, tmp_path)
    job = Job(small, tmp_path, IN_STEP_5)
    assert job.code not in (0, None)
    assert job.seconds < 30
    goes_on(small, tmp_path, whole_of_two)
    record_property("F3", f"rank 1 killed: job over after {job.seconds:.1f} s, 0 orphans, resumed equal")


def test_the_launcher_is_killed(small, whole_of_two, tmp_path, record_property):
    run = from_split(whole_of_two, tmp_path)
    job = Job(small, tmp_path, replace(IN_STEP_5, whom=launcher))
    assert job.code == -signal.SIGKILL
    assert job.seconds < 10
    left = contents(run)
    time.sleep(2)
    assert contents(run) == left
    goes_on(small, tmp_path, whole_of_two)
    record_property("F4", f"torchrun killed: no rank left after {job.seconds:.1f} s, nothing written later, equal")


SIGNALS = {
    "TERM to torchrun": replace(IN_STEP_5, signal=TERM, whom=launcher),
    "TERM to torchrun, twice": replace(IN_STEP_5, signal=TERM, whom=launcher, times=2),
    "USR1 to one rank": replace(IN_STEP_5, signal=USR1),
}


def stopped(tiny: Tiny, place: Path, mine: KillIn) -> float:
    """Return the seconds from the signal to the end of a job that ends as one that was told to stop."""
    job = Job(tiny, place, mine)
    assert job.code not in (0, None)
    assert job.seconds < 25
    assert status(place / "run")["exit_code"] == 143, job.printed
    return job.seconds


@pytest.mark.parametrize("how", SIGNALS)
def test_a_signal_in_training_saves_both_ranks_at_one_step(small, whole_of_two, tmp_path, how, record_property):
    run = from_split(whole_of_two, tmp_path)
    seconds = stopped(small, tmp_path, SIGNALS[how])
    assert checkpoints(run)[-1] == f"step-{steps(run)[-1][0]:08d}"
    goes_on(small, tmp_path, whole_of_two)
    record_property("F5", f"{how}: both saved at one step, over after {seconds:.1f} s, 143 in STATUS.json, equal")


def test_a_signal_while_the_reference_scores(small, whole_of_two, tmp_path, record_property):
    seconds = stopped(small, tmp_path, replace(PHASES["scoring"], call=1, signal=TERM, whom=launcher))
    goes_on(small, tmp_path, whole_of_two)
    record_property("F5", f"TERM to torchrun, scoring: over after {seconds:.1f} s, 143 in STATUS.json, equal")
