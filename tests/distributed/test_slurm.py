"""Slurm, the real one: a job that is pre-empted three times, or out of time, ends as if nobody had disturbed it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.agents import wait_until
from tests.distributed.cluster import Cluster, missing
from tests.faults.runs import assert_same, from_split, words_of
from tests.forked import done, free_port
from tests.tiny import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing())]

WAITS = """
import time
from pathlib import Path
from sftmix.components import Callback
from sftmix.training.signals import StopSignal

class Waits(Callback):
    \"\"\"Waits at some steps of the training until this rank is told to stop, two minutes at most.\"\"\"
    gives = frozenset()
    def on_step_end(self, state):
        if state.stage == "train" and state.step in (2, 5, 10):
            Path(f"waits-{state.step}").touch()
            stop, deadline = StopSignal("at_step"), time.monotonic() + 120
            while not stop.received and time.monotonic() < deadline:
                time.sleep(0.05)
"""
PRE_EMPTED_AT = (2, 5, 10)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    cluster = Cluster.started(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    """The uninterrupted run on two ranks."""
    place = tmp_path_factory.mktemp("whole")
    done(words_of(small), cwd=place, ranks=2)
    return place / "run"


def script_of_the_docs(name: str, words: list[str], port: int) -> str:
    """A batch script of docs/examples/slurm with these words, for one node."""
    script = (ROOT / "docs" / "examples" / "slurm" / f"{name}.sh").read_text(encoding="utf-8")
    own = "" if "--rdzv_endpoint" in script else f" --master_port {port}"
    of_a_cluster = "gpus|gpus-per-node|nodes|ntasks-per-node|cpus-per-task|time"
    script = re.sub(rf"^#SBATCH --({of_a_cluster})=.*\n", "", script, flags=re.M)
    script = script.replace("USR1@300", "USR1@60").replace("TERM@300", "TERM@60").replace("29500", str(port))
    script = script.replace("--nproc_per_node 8", f"--nproc_per_node 2{own}")
    script, found = re.subn(
        r"run --config recipe:.*?( &)?$", lambda line: shlex.join(words) + (line[1] or ""), script, flags=re.M
    )
    assert found == 1
    return script


@pytest.mark.parametrize("name", ["one_node", "srun"])
def test_pre_empted_three_times(cluster, small, whole, tmp_path, name):
    from_split(whole, tmp_path)
    (tmp_path / "waiting.py").write_text(WAITS)
    words = words_of(small, "--callbacks+", "waiting.Waits")
    (tmp_path / "job.sh").write_text(script_of_the_docs(name, words, free_port()))
    number = cluster.submit(["--ntasks-per-node=2", "--output=job.txt", "job.sh"], cwd=tmp_path)
    try:
        for times, step in enumerate(PRE_EMPTED_AT, start=1):
            wait_until((tmp_path / f"waits-{step}").exists)
            cluster.submit(["--ntasks=2", "--partition=high", "--wrap=true"], cwd=tmp_path)
            wait_until(lambda times=times: cluster.job(number).get("Restarts") == str(times))
        wait_until(lambda: cluster.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"))
    finally:
        print((tmp_path / "job.txt").read_text(), cluster.job(number))
    assert cluster.job(number)["JobState"] == "COMPLETED"
    assert_same(tmp_path / "run", whole)
    printed = (tmp_path / "job.txt").read_text()
    assert [f"resuming after step {step}" in printed for step in PRE_EMPTED_AT] == [True] * 3


def test_out_of_time_and_submitted_again(cluster, small, whole, tmp_path):
    """Slurm sends SIGTERM to each torchrun 60 s before the end of the two minutes of a job, which waits for it."""
    from_split(whole, tmp_path)
    (tmp_path / "waiting.py").write_text(WAITS)
    words = words_of(small, "--callbacks+", "waiting.Waits")
    (tmp_path / "job.sh").write_text(script_of_the_docs("torchrun", words, free_port()))
    submission = ["--time=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--open-mode=append", "--output=job.txt"]
    states: list[str] = []
    while "COMPLETED" not in states and len(states) < 8:  # a slow machine needs some more than four
        number = cluster.submit([*submission, "job.sh"], cwd=tmp_path)
        wait_until(lambda n=number: cluster.job(n)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
        states.append(cluster.job(number)["JobState"])
    printed = (tmp_path / "job.txt").read_text()
    assert states == ["FAILED"] * (len(states) - 1) + ["COMPLETED"], printed
    assert len(states) > len(PRE_EMPTED_AT)
    assert printed.count("train: resuming after step ") >= len(PRE_EMPTED_AT)
    assert_same(tmp_path / "run", whole)
