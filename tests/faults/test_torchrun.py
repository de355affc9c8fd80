"""F1, F3, F4 and F5 under torchrun: two ranks and their launcher, killed or told to stop in every stage."""

import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.agents import wait_until
from tests.faults.mines import KillIn, everyone, gone, launcher, script
from tests.faults.runs import (
    PHASES,
    assert_little_is_lost,
    checkpoints,
    from_split,
    goes_on,
    steps,
    words_of,
)
from tests.tiny import ROOT, Tiny, contents, sftmix, status

pytestmark = [pytest.mark.slow, pytest.mark.long]

KILL, TERM, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1
LAYS = """
import os, pickle
from pathlib import Path

if "RANK" in os.environ and not (me := Path(f"pid-{os.environ['RANK']}")).exists():  # no process that a rank starts
    me.write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        pickle.loads(Path("mine").read_bytes())()
"""
"""Python runs this first thing in every process of the job."""
Runs = Callable[..., subprocess.CompletedProcess[str]]


class Job:
    """A run of two ranks under torchrun, with a mine in the second; `seconds` from the signal to the end of all."""

    def __init__(self, tiny: Tiny, place: Path, mine: KillIn, *words: str, runs: Runs = sftmix) -> None:
        for name in ("pid-0", "pid-1", "signalled"):
            (place / name).unlink(missing_ok=True)
        (place / "sitecustomize.py").write_text(LAYS)
        (place / "mine").write_bytes(pickle.dumps(mine))
        path = f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", path)
            it = runs(*sharing(tiny), *words, ranks=2, cwd=place)  # returns when the last that can print is gone
        self.code, self.printed = it.returncode, it.stdout + it.stderr
        assert (place / "signalled").exists(), self.printed
        self.seconds = time.time() - float((place / "signalled").read_text())
        ranks = [int((place / f"pid-{rank}").read_text()) for rank in (0, 1)]
        # A killed process closes its files some time before it is gone, and a busy machine makes that longer.
        wait_until(lambda: all(map(gone, ranks)), 5)


def sharing(tiny: Tiny) -> list[str]:
    return [*words_of(tiny), "--training.parallel", "fsdp"]


def test_all_are_killed_in_every_stage(small, whole_of_two, tmp_path):
    """One run directory: each start goes on where the one before was killed, at a random moment of the next phase."""
    chance = random.Random("torchrun")
    for phase, mine in PHASES.items():
        after = chance.uniform(0, 0.0 if phase == "measuring" else 0.5)
        job = Job(small, tmp_path, replace(mine, call=1, after=after, whom=everyone))
        assert job.code == -KILL, phase
        assert_little_is_lost(tmp_path / "run")
    goes_on(sharing(small), tmp_path, whole_of_two, ranks=2)


IN_STEP_5 = KillIn("training/step.py", "train_step", call=5)


def test_one_rank_is_killed(small, whole_of_two, tmp_path):
    from_split(whole_of_two, tmp_path)
    job = Job(small, tmp_path, IN_STEP_5)
    assert job.code not in (0, None)
    assert job.seconds < 30
    goes_on(sharing(small), tmp_path, whole_of_two, ranks=2)


def batch_script(*words: str, ranks: int, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The batch script with a trap, of docs/examples/slurm, with these words and ranks."""
    body = (ROOT / "docs" / "examples" / "slurm" / "one_node.sh").read_text(encoding="utf-8")
    ours = f"--nproc_per_node {ranks} --master_port 0 --rdzv_backend c10d --rdzv_endpoint localhost:0 -m sftmix "
    body, count = re.subn(r"--nproc_per_node 8 -m sftmix .*(?= &$)", ours + shlex.join(words), body, flags=re.M)
    assert count == 1
    (cwd / "job.sh").write_text(body)
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"}
    paths["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "job.sh"], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


SIGNALS = {
    "KILL to torchrun": (replace(IN_STEP_5, whom=launcher), -KILL),
    "USR1 to torchrun": (replace(IN_STEP_5, signal=USR1, whom=launcher), -USR1),
    "TERM to torchrun": (replace(IN_STEP_5, signal=TERM, whom=launcher), 1),
    "TERM to torchrun, twice": (replace(IN_STEP_5, signal=TERM, whom=launcher, times=2), None),
    "USR1 to one rank": (replace(IN_STEP_5, signal=USR1), 1),
    "USR1 to the batch script of the docs": (replace(IN_STEP_5, signal=USR1, whom=script), None),
}


def stopped(tiny: Tiny, place: Path, mine: KillIn, code: int | None, runs: Runs = sftmix) -> None:
    """A job that ends as one that was told to stop, in time."""
    job = Job(tiny, place, mine, runs=runs)
    assert job.code == code or (code is None and job.code != 0), job.printed
    assert job.seconds < 25
    assert status(place / "run")["exit_code"] == 143, job.printed


@pytest.mark.parametrize("how", SIGNALS)
def test_a_signal_in_training_saves_both_ranks_at_one_step(small, whole_of_two, tmp_path, how):
    """Nothing is written later, also where torchrun is gone."""
    run = from_split(whole_of_two, tmp_path)
    stopped(small, tmp_path, *SIGNALS[how], runs=batch_script if "script" in how else sftmix)
    assert checkpoints(run)[-1] == f"step-{steps(run)[-1][0]:08d}"
    left = contents(run)
    time.sleep(2)
    assert contents(run) == left
    goes_on(sharing(small), tmp_path, whole_of_two, ranks=2)


def test_a_signal_while_the_reference_scores(small, whole_of_two, tmp_path):
    mine = replace(PHASES["scoring"], call=1, signal=TERM, whom=launcher)
    stopped(small, tmp_path, mine, None)
    goes_on(sharing(small), tmp_path, whole_of_two, ranks=2)


DEAF = """
import os, signal, time
from sftmix.components import Callback

class Deaf(Callback):
    \"\"\"From step 5 on, rank 1 hears no SIGTERM; the other waits for it in a collective.\"\"\"
    gives = frozenset()
    def on_step_end(self, state):
        if (state.stage, state.step, os.environ["RANK"]) == ("train", 5, "1"):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            time.sleep(600)
"""


def test_ranks_that_cannot_stop_are_ended(small, whole_of_two, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "4")
    (tmp_path / "deaf.py").write_text(DEAF)
    run = from_split(whole_of_two, tmp_path)
    mine = replace(IN_STEP_5, after=3, whom=launcher)
    job = Job(small, tmp_path, mine, "--checkpoint.every", "100", "--callbacks+", "deaf.Deaf")
    assert job.code == -KILL
    assert "torchrun is gone, and this did not stop in 4 s" in job.printed
    # Ended together they write nothing; if the deaf one goes first, the other may still tell of the broken collective.
    assert status(run)["exit_code"] in (None, 1)
    assert not list((run / "train").glob("checkpoints/*/MANIFEST.json"))
