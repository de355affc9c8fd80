"""F5 and F20: signals that stop a run save it on all ranks alike; a rank that hangs ends it.

Signals to torchrun and to one rank under it, a dead rank and a dead launcher: tests/faults/test_torchrun.py.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from sftmix.training.signals import StopSignal
from sftmix.words.errors import Stopped
from tests.faults.mines import KillAt, KillIn, gone
from tests.faults.runs import checkpoints, from_split, goes_on, long, steps, words_of
from tests.forked import ended, start
from tests.tiny import sftmix, status

TERM, USR1 = int(signal.SIGTERM), int(signal.SIGUSR1)
GRACE = 25.0
"""Seconds from the signal to the end."""

SAVE = "train/checkpoints/.tmp-step-00000006"
IN_TRAINING = {
    "training": KillIn("training/step.py", "train_step", call=5, signal=TERM),
    "USR1": KillIn("training/step.py", "train_step", call=5, signal=USR1),
    "twice": KillIn("training/step.py", "train_step", call=5, signal=TERM, times=2),
    "in a save": KillAt(SAVE, 4, signal=TERM),
}
OUTSIDE = {
    "scoring": KillIn("training/scoring.py", "__call__", call=2, signal=TERM),
    "measuring": KillIn("measure/model.py", "measure", signal=TERM),
}


def stopped(words: list[str], place: Path, mine) -> None:
    began = time.time()
    it = ended(words, cwd=place, faults=[mine])
    assert it.code == 143, it.printed
    sent = place / "signalled"
    assert time.time() - (float(sent.read_text()) if sent.exists() else began) < GRACE
    assert status(place / "run")["exit_code"] == 143


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "in a save",
        *(pytest.param(how, marks=pytest.mark.long) for how in ("training", "USR1", "twice")),
    ],
)
def test_a_signal_in_training_loses_no_step(small, whole, tmp_path, how):
    run = from_split(whole, tmp_path)
    stopped(words_of(small), tmp_path, IN_TRAINING[how])
    last = steps(run)[-1][0]
    assert checkpoints(run)[-1] == f"step-{last:08d}"
    assert f"resuming after step {last} of 12" in goes_on(words_of(small), tmp_path, whole)


@long
@pytest.mark.parametrize("how", OUTSIDE)
def test_a_signal_outside_training(small, whole, tmp_path, how):
    if how == "measuring":
        from_split(whole, tmp_path)
    stopped(words_of(small), tmp_path, OUTSIDE[how])
    goes_on(words_of(small), tmp_path, whole)


# ----------------------------------------------------------------------------------------------------------- a hang

HANGS = '''
import os, time
from pathlib import Path
from sftmix.components import Callback

class Hangs(Callback):
    """Rank 1 sleeps in step 5, the first time."""
    gives = frozenset()
    def on_step_end(self, state):
        if (state.stage, state.step) == ("train", 5) and not Path("hung").exists():
            Path(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
            if os.environ["RANK"] == "1":
                time.sleep(0.5)  # the other has looked
                Path("hung").write_text(str(time.time()))
                time.sleep(10**6)
'''


def test_a_rank_whose_peer_has_failed_waits_for_no_step_boundary(tmp_path, monkeypatch):
    """torchrun gives each rank a directory for its error, side by side."""
    for rank in "01":
        (tmp_path / "attempt_0" / rank).mkdir(parents=True)
    own, others = (tmp_path / "attempt_0" / rank / "error.json" for rank in "01")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(own))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    own.touch()
    with StopSignal("at_step") as told:
        os.kill(os.getpid(), TERM)
        assert told.received
        others.touch()
        with pytest.raises(Stopped, match="another rank failed"):
            os.kill(os.getpid(), TERM)


TIMEOUT = 20
MARGIN = 10


@pytest.mark.slow
def test_a_rank_whose_peer_hangs_gives_up(small, whole, tmp_path):
    (tmp_path / "hanging.py").write_text(HANGS)
    words = words_of(small, "--callbacks+", "hanging.Hangs", "--training.timeout", "3")
    from_split(whole, tmp_path)
    job = start(words, cwd=tmp_path, faults=[None, None])
    job.processes[0].join(200)
    waited = time.time() - float((tmp_path / "hung").read_text())
    code = job.processes[0].exitcode
    job.kill()
    job.wait()
    assert code == 1, job.printed
    assert waited < 3 + MARGIN
    assert "training.timeout" in job.printed


@long
def test_a_hang_ends_the_job_of_torchrun(small, whole_of_two, tmp_path):
    (tmp_path / "hanging.py").write_text(HANGS)
    more = ("--training.parallel", "fsdp", "--callbacks+", "hanging.Hangs", "--training.timeout", str(TIMEOUT))
    from_split(whole_of_two, tmp_path)
    it = sftmix(*words_of(small, *more), ranks=2, cwd=tmp_path)
    waited = time.time() - float((tmp_path / "hung").read_text())
    assert it.returncode != 0
    assert waited < TIMEOUT + MARGIN, it.stderr
    assert all(gone(int((tmp_path / f"pid-{rank}").read_text())) for rank in (0, 1))
    goes_on(words_of(small, *more), tmp_path, whole_of_two, ranks=2)
