"""Runs in real processes that can be killed, and what two runs must have in common.

Processes are forked from a server that has imported what takes long, once for all tests, so that a run starts at once.
Ranks are forked side by side; the tests of torchrun itself start it (tests/distributed/test_launcher.py).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sftmix.common.checkpoints import steps_in
from tests.faults.mines import KillIn
from tests.tiny import STAGES, Tiny, metrics
from tests.toy import free_port

EVERY = 3
"""Steps between the checkpoints of a run here: it has 12 steps, so it saves four times and prunes twice."""

LOOP, SCORES, MEASURES = "training/loop.py", "training/scoring.py", "measure/model.py"
PHASES = {
    "reference": KillIn(LOOP, "run"),
    "scoring": KillIn(SCORES, "__call__", call=2),
    "training": KillIn(LOOP, "run"),
    "measuring": KillIn(MEASURES, "trained"),
}
"""What a run does, and a kill at its beginning."""

Fault = Callable[[], None]
"""Picklable; called in a process before its command, to lay the mine."""


def words_of(tiny: Tiny, *more: str) -> list[str]:
    """The words of a whole run of the tiny model, in the directory `run`."""
    return ["run", *tiny.options, "--checkpoint.every", str(EVERY), "--out", "run", *more]


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
        """Wait for the end; once a rank has failed, the others are killed, as torchrun would. Return exit codes."""
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sftmix.pipeline.recipe", "transformers.models.llama.modeling_llama"])
    port, file = free_port(), cwd / log
    file.unlink(missing_ok=True)
    given = [(list(words), str(cwd), str(file), rank, len(faults), port, fault) for rank, fault in enumerate(faults)]
    processes = [context.Process(target=_rank, args=each) for each in given]
    for process in processes:
        process.start()
    return Job(processes, file)


def ended(words: Sequence[str], *, cwd: Path, faults: Sequence[Fault | None] = (None,)) -> Ended:
    """Run a command to its end, whatever that is."""
    job = start(words, cwd=cwd, faults=faults)
    return Ended(job.wait(), job.printed)


def done(words: Sequence[str], *, cwd: Path, ranks: int = 1) -> str:
    """Run a command that must succeed; return what it printed."""
    it = ended(words, cwd=cwd, faults=[None] * ranks)
    assert it.codes == [0] * ranks, f"{it.codes}\n{it.printed}"
    return it.printed


def _rank(words: list[str], cwd: str, log: str, rank: int, ranks: int, port: int, fault: Fault | None) -> None:
    os.chdir(cwd)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    import torch

    from sftmix.cli import main

    torch.set_num_threads(1)
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
    if fault is not None:
        fault()
    sys.exit(main(words))


# ------------------------------------------------------------------------------------------------ what is compared


def digest(run: Path, stage: str = "train") -> str:
    """The SHA-256 of the exported weights."""
    return hashlib.sha256((run / stage / "model" / "model.safetensors").read_bytes()).hexdigest()


def steps(run: Path, stage: str = "train") -> list[tuple[int, str, str]]:
    """Step, loss and norm of the gradient of each step, every bit of them."""
    return [(m["step"], float(m["loss"]).hex(), float(m["grad_norm"]).hex()) for m in metrics(run, stage)]


def assert_same(run: Path, whole: Path) -> None:
    """Every loss of both trainings, every score and every weight are those of the uninterrupted run."""
    assert steps(run) == steps(whole)
    assert steps(run, "reference") == steps(whole, "reference")
    assert digest(run) == digest(whole)
    for name in ("confidence/dynamics.parquet", "split/split.parquet", "train/eval.parquet"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def from_split(whole: Path, place: Path) -> Path:
    """A run directory in which all is done but the training."""
    for stage in STAGES:
        shutil.copytree(whole / stage, place / "run" / stage)
    return place / "run"


def checkpoints(run: Path, stage: str = "train") -> list[str]:
    """The names in the directory of checkpoints, leftovers included."""
    directory = run / stage / "checkpoints"
    return sorted(p.name for p in directory.iterdir()) if directory.exists() else []


def leftovers(run: Path) -> list[str]:
    """What a kill may leave behind, and the next run must remove."""
    return [str(p.relative_to(run)) for pattern in (".tmp-*", ".old-*") for p in run.rglob(pattern)]


def assert_little_is_lost(run: Path) -> None:
    for stage in ("reference", "train"):
        if (run / stage / "metrics.jsonl").exists() and not (run / stage / "MANIFEST.json").exists():
            made, saved = len(steps(run, stage)), steps_in(run / stage / "checkpoints")
            assert made - max(saved, default=0) <= EVERY + 1, (stage, made, saved)


SIGKILLED = -int(signal.SIGKILL)
