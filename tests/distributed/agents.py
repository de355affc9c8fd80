"""Several torchruns on this machine, one for each node of a job; torchrun tells nodes apart by GROUP_RANK alone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.mines import children
from tests.tiny import ROOT


@dataclass
class Agent:
    """One torchrun with its ranks, and where they print; they are a process group of their own."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 300) -> int:
        """Return its exit code; kill it, and fail, if it has not ended after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.printed[-4000:]}") from None

    def kill(self) -> None:
        """Kill the torchrun and, as the end of a machine would, its ranks, which are in sessions of their own."""
        ranks = children(self.process.pid)
        for pid in [self.process.pid, *ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def start_agent(
    words: Sequence[str],
    *,
    cwd: Path,
    port: int,
    store: str = "localhost",
    nodes: str = "2",
    restarts: int = 0,
    env: Mapping[str, str] = {},
    before: Sequence[str] = (),
) -> Agent:
    """Start the torchrun of one node with one rank.

    nodes   as --nnodes has it: a number, or the least and the most as 1:2
    port    of the store in which the nodes find each other: the first one here makes it
    store   the host that has it
    before  words before the command, which start it on another host
    """
    launcher = ["-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", "1"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{store}:{port}", "--rdzv_id", "test"]
    launcher += ["--local_addr", "localhost"] * (store == "localhost")
    launcher += ["--max_restarts", str(restarts), "-m", "sftmix"]
    paths = os.pathsep.join([*filter(None, [env.get("PYTHONPATH")]), str(ROOT)])
    environment = {**os.environ, **env, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    log = cwd / f"agent-{time.monotonic_ns()}.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*before, sys.executable, *launcher, *words], cwd=cwd, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    return Agent(process, log)


def wait_until(what: Callable[[], object], seconds: float = 240) -> None:
    """Wait until something is true; fail if it is not after so many seconds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
