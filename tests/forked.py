"""Commands and ranks in real processes, which can be killed.

They are forked from a server that has imported what takes long, once for all tests of a worker, so that they start at
once. The tests of torchrun itself start it (tests/distributed/test_launcher.py, tests/faults/test_torchrun.py).
"""

import contextlib
import gc
import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

PRELOADED = (
    "sftmix.cli.parsing",
    "sftmix.pipeline.recipe",
    "sftmix.pipeline.arm",
    "sftmix.pipeline.reference_run",
    "pandas",
    "scipy.stats",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
_ASKED = itertools.count()

SIGKILLED = -int(signal.SIGKILL)
"""The exit code of a process that was killed."""

Fault = Callable[[], None]
"""Picklable; called in a process before its command, to lay the mine."""


@dataclass
class Job:
    """The processes of one command, one for each rank, and where they print."""

    processes: list[multiprocessing.Process]
    log: Path

    def kill(self, rank: int | None = None) -> None:
        """Send SIGKILL to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.kill()

    def wait(self, seconds: float = 240) -> list[int | None]:
        """Wait for the end; once a rank has failed, the others are killed, as torchrun would. Return exit codes.

        One thread may wait: of two that ask a forked process for its exit code at once, one is told 255.
        """
        deadline = time.monotonic() + seconds
        while any(p.is_alive() for p in self.processes) and not any(p.exitcode for p in self.processes):
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self.printed)
            time.sleep(0.01)
        codes = []
        for process in self.processes:
            process.join(0.0 if process.exitcode else 20 if any(p.exitcode for p in self.processes) else seconds)
            codes.append(process.exitcode)
        self.kill()
        for process in self.processes:
            process.join()
        return codes

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass(frozen=True)
class Ended:
    """A command that has ended: exit codes by rank (negative: a signal; None: killed after another one's end)."""

    codes: list[int | None]
    printed: str

    @property
    def code(self) -> int | None:
        return self.codes[0]


def start(
    words: Sequence[str], *, cwd: Path, faults: Sequence[Fault | None] = (None,), log: str = "printed.txt"
) -> Job:
    """Start a command with one rank for each entry of `faults`, which is done to it first."""
    file = cwd / log
    file.unlink(missing_ok=True)
    given = [(list(words), str(cwd), str(file), fault) for fault in faults]
    return Job(_forked(_command, given, world=len(given) > 1), file)


def ended(words: Sequence[str], *, cwd: Path, faults: Sequence[Fault | None] = (None,)) -> Ended:
    """Run a command to its end, whatever that is."""
    job = start(words, cwd=cwd, faults=faults)
    return Ended(job.wait(), job.printed)


def done(words: Sequence[str], *, cwd: Path, ranks: int = 1) -> str:
    """Run a command that must succeed; return what it printed."""
    it = ended(words, cwd=cwd, faults=[None] * ranks)
    assert it.codes == [0] * ranks, f"{it.codes}\n{it.printed}"
    return it.printed


def on_ranks(work: Callable[..., None], *words: object, ranks: int = 2) -> None:
    """Call a module-level `work(world, *words)` on so many ranks (gloo); an error of any fails the test."""
    processes = _forked(_work, [(work.__module__, work.__name__, words)] * ranks, world=True)
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # a rank whose peer failed may wait for it
    assert codes == [0] * ranks, f"exit codes of the ranks: {codes} (their tracebacks are on stderr)"


def free_port() -> int:
    """A port that nobody else takes in the moment before the ranks listen on it.

    Below the range from which the system hands out ports, and another stretch of it for each worker of pytest-xdist.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20
    start = 20_000 + 500 * worker
    for port in range(start + next(_ASKED) % 400, start + 500):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", port))
            return port
    raise RuntimeError(f"no free port in {start}..{start + 499}")


def _forked(
    target: Callable[..., None], given: Sequence[tuple[object, ...]], *, world: bool
) -> list[multiprocessing.Process]:
    """Start `target(*words)` in one process for each entry of `given`.

    world  if True, they have what torchrun gives to ranks, one alone, too
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    names = {"WORLD_SIZE": len(given), "LOCAL_WORLD_SIZE": len(given), "MASTER_ADDR": "localhost"}
    names |= {"MASTER_PORT": free_port()}
    processes = []
    for rank, words in enumerate(given):
        own = {**names, "RANK": rank, "LOCAL_RANK": rank} if world else {}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        processes.append(context.Process(target=_begin, args=(environment, target, words)))
    for process in processes:
        process.start()
    return processes


def _begin(environment: dict[str, str], target: Callable[..., None], words: Sequence[object]) -> None:
    import torch

    gc.freeze()  # what the server has imported: a run collects before each of its models
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    # multiprocessing ends a process without what Python does at its end: temporary directories would stay.
    with TemporaryDirectory(ignore_cleanup_errors=True) as tempfile.tempdir:
        target(*words)


def _command(words: list[str], cwd: str, log: str, fault: Fault | None) -> None:
    from sftmix.cli import main

    os.chdir(cwd)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    if fault is not None:
        fault()
    sys.exit(main(words))


def _work(module: str, name: str, words: Sequence[object]) -> None:
    from sftmix.ranks.world import start_world

    with start_world() as world:
        getattr(importlib.import_module(module), name)(world, *words)
