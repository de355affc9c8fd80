"""Under torchrun: one error told once, and ranks that end with their launcher having saved."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny import ROOT, Tiny, make_tiny, metrics, sftmix, status, weights

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


# --------------------------------------------------------------------------------------------------------- one error


@pytest.mark.slow
def test_a_mistake_in_an_option_is_told_first_and_last_and_by_one_rank(tmp_path):
    done = sftmix("run", "--training.epochz", "3", ranks=3, cwd=tmp_path)
    assert done.returncode == 1  # torchrun's own for any failure
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: unknown option training.epochz")
    assert lines[-2].strip().startswith("traceback : error: unknown option training.epochz")
    assert sum(line.strip().startswith("exitcode") for line in lines) == 1, done.stderr
    assert sum("epochz" in line for line in lines) == 2
    assert any(line.split()[:3] == ["exitcode", ":", "2"] for line in lines)


@pytest.mark.slow
def test_an_error_of_all_ranks_is_in_status_and_told_by_one(tiny, tmp_path):
    words = [word if word != str(tiny.train) else "no.json" for word in tiny.options]
    done = sftmix("run", *words, "--out", "run", ranks=2, cwd=tmp_path)
    assert done.returncode == 1
    assert status(tmp_path / "run")["exit_code"] == 3
    lines = done.stderr.splitlines()
    begins = [line.split("no.json")[0].strip() for line in lines if "no.json" in line]
    assert begins == [f"run: {tiny.model} on", "error: data.train:", "traceback : error: data.train:"]
    assert lines[-2].strip().startswith("traceback : error: data.train")
    assert sum(line.strip().startswith("exitcode") for line in lines) == 1


EACH_RANK_REFUSES = """
import os, time
from sftmix.common.errors import ConfigError
from sftmix.components import RandomSplit

class Refuses(RandomSplit):
    def __init__(self):
        if os.environ.get("RANK") == "1":
            raise ConfigError("rank one says no")
        time.sleep(2)  # rank one waits for this
        raise ConfigError("rank zero says never")
"""


@pytest.mark.slow
def test_a_rank_tells_its_own_error_where_the_first_has_another(tiny, tmp_path):
    (tmp_path / "refusing.py").write_text(EACH_RANK_REFUSES)
    words = ["run", *tiny.options, "--splitter", "refusing.Refuses", "--out", "run"]
    done = sftmix(*words, ranks=2, cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    for rank, said in enumerate(("rank zero says never", "rank one says no")):
        told = [line for line in lines if said in line and "traceback : " not in line]
        assert len(told) == 1
        assert told[0].startswith(f"[rank {rank}] error: " if rank else "error: ")


@pytest.mark.slow
@pytest.mark.parametrize("by_path", [False, True], ids=["-m sftmix", "cli.py"])
def test_fsdp_alone_is_told_the_command_that_works_here(tiny, tmp_path, by_path):
    program = [str(ROOT / "cli.py")] if by_path else ["-m", "sftmix"]
    done = subprocess.run(
        [sys.executable, *program, "run", *tiny.options, "--training.parallel", "fsdp", "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"torchrun --nproc_per_node N {' '.join(program)} " in done.stderr


# ----------------------------------------------------------------------------------------------- the end of a launcher

SIGNALS = """
import os, signal, time
from pathlib import Path
from sftmix.components import Callback

class SignalOnce(Callback):
    \"\"\"Sends a signal at step 5, the first time it gets there, and notes who the ranks are.\"\"\"
    gives = frozenset()
    def __init__(self, *, to: str, signal: int, deaf: bool = False):
        \"\"\"to: rank, launcher, or script, which started it. deaf: from then on, this rank hears no SIGTERM.\"\"\"
        self.to, self.signal, self.deaf = to, signal, deaf
    def on_step_end(self, state):
        if (state.stage, state.step) != ("train", 5) or Path("signalled").exists():
            return
        Path(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
        if os.environ["RANK"] == "1":
            while not Path("pid-0").exists():
                time.sleep(0.01)
            Path("signalled").touch()
            if self.deaf:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            launcher = os.getppid()
            script = int(Path(f"/proc/{launcher}/stat").read_text().rsplit(")", 1)[1].split()[1])
            os.kill({"rank": os.getpid(), "launcher": launcher, "script": script}[self.to], self.signal)
            time.sleep(600 if self.deaf else 3)  # longer than it takes to see that the launcher is gone
"""
WORDS = ("--training.parallel", "fsdp", "--checkpoint.every", "100", "--callbacks+", "signals.SignalOnce")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


Runs = Callable[..., subprocess.CompletedProcess[str]]


def signalled(tiny: Tiny, place: Path, to: str, number: int, *words: str, runs: Runs = sftmix) -> str:
    """Run until a signal ends it; no rank may be left within a minute of the signal. Returns what was printed."""
    (place / "signals.py").write_text(SIGNALS)
    signal = ("--callbacks.to", to, "--callbacks.signal", str(number))
    done = runs("run", *tiny.options, *WORDS, *signal, *words, "--out", "run", ranks=2, cwd=place)
    pids = [int((place / f"pid-{rank}").read_text()) for rank in (0, 1)]
    sent = (place / "signalled").stat().st_mtime
    while not all(map(gone, pids)):
        assert time.time() < sent + 60, [pid for pid in pids if not gone(pid)]
        time.sleep(0.1)
    return f"{done.returncode} {done.stdout} {done.stderr}"


def assert_saved(run: Path) -> None:
    told = status(run)
    assert (told["exit_code"], told["stage"], told["step"]) == (143, "train", 5)
    assert (run / "train" / "checkpoints" / "step-00000005" / "MANIFEST.json").exists()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """The uninterrupted run on two ranks."""
    place = tmp_path_factory.mktemp("whole")
    done = sftmix("run", *tiny.options, *WORDS[:4], "--out", "run", ranks=2, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "number", "code"),
    [("launcher", 9, -9), ("launcher", 10, -10), ("launcher", 15, 1), ("rank", 10, 1)],
    ids=["launcher KILL", "launcher USR1", "launcher TERM", "one rank USR1"],
)
def test_ranks_save_and_end_with_their_launcher(tiny, whole, tmp_path, to, number, code):
    for stage in ("reference", "confidence", "split"):
        shutil.copytree(whole / stage, tmp_path / "run" / stage)
    assert signalled(tiny, tmp_path, to, number).startswith(f"{code} ")
    assert_saved(tmp_path / "run")
    signal = ("--callbacks.to", to, "--callbacks.signal", str(number))
    again = sftmix("run", *tiny.options, *WORDS, *signal, "--out", "run", ranks=2, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming after step 5" in again.stdout
    assert [m["loss"] for m in metrics(tmp_path / "run")] == [m["loss"] for m in metrics(whole)]
    left, right = weights(tmp_path / "run"), weights(whole)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_ranks_that_cannot_stop_are_ended(tiny, whole, tmp_path, monkeypatch):
    """One hears nothing, the other waits for it in a collective."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "4")
    for stage in ("reference", "confidence", "split"):
        shutil.copytree(whole / stage, tmp_path / "run" / stage)
    printed = signalled(tiny, tmp_path, "launcher", 9, "--callbacks.deaf", "true")
    assert printed.startswith("-9 ")
    assert "torchrun is gone, and this did not stop in 4 s" in printed
    # Ended together they write nothing; if the deaf one goes first, the other may still tell of the broken collective.
    assert status(tmp_path / "run")["exit_code"] in (None, 1)
    assert not list((tmp_path / "run" / "train").glob("checkpoints/*/MANIFEST.json"))


def batch_script(*words: str, ranks: int, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The body of the batch script with a trap, as the page on distributed runs has it, with these words and ranks."""
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    (script,) = (body for body in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) if "trap" in body)
    ours = f"--nproc_per_node {ranks} --master_port 0 --rdzv_backend c10d --rdzv_endpoint localhost:0 -m sftmix "
    script, found = re.subn(r"--nproc_per_node 8 -m sftmix .*(?= &$)", ours + shlex.join(words), script, flags=re.M)
    assert found == 1
    (cwd / "job.sh").write_text(script)
    paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = {**os.environ, **paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "job.sh"], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_batch_script_of_the_docs_hands_the_signal_on(tiny, whole, tmp_path):
    for stage in ("reference", "confidence", "split"):
        shutil.copytree(whole / stage, tmp_path / "run" / stage)
    signalled(tiny, tmp_path, "script", 10, runs=batch_script)
    assert_saved(tmp_path / "run")
