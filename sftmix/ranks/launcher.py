"""torchrun, if it started this process: what ranks report to it, and how they end with it.

torchrun starts one process per rank, watches them, and ends the others when one fails. It names itself in variables of
the environment that start with TORCHELASTIC. Nothing here needs torch.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from sftmix.disk.files import read_json, write_json
from sftmix.words.errors import NoSpaceError

GRACE = 60.0
"""Seconds that a rank has to save and end once torchrun is gone, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says another
number: torchrun reads it as well, as the time from its own SIGTERM to SIGKILL (30 if it is not set)."""

BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""A variable of the environment of every process that torchrun started."""

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_OF_RANK_0 = ("MASTER_ADDR", "MASTER_PORT")
_TOGETHER = (
    "this is only a part of what torchrun sets, or the numbers do not fit each other: RANK, LOCAL_RANK, WORLD_SIZE, "
    "MASTER_ADDR and MASTER_PORT go together. Start with torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE for a "
    "single process"
)
PATIENCE = 30.0
"""Seconds that a rank waits for the error of the first one: as long as torchrun waits before it kills."""

_watched: list[int] = []
"""The process id of the torchrun whose end is watched for."""


def needs_torchrun(parallel: str, ranks: int | str = "N") -> str:
    """Return the sentence that refuses fsdp or hsdp in a process that torchrun did not start."""
    command = f"torchrun --nproc_per_node {ranks} -m sftmix ..."
    return f"training.parallel {parallel} needs torchrun: {command} (or your script)"


def launch_problem() -> str | None:
    """Return what is wrong with the variables that say which rank a process is; None if it can be one.

    An address alone says nothing about ranks: a batch script may export it for later steps.
    """
    try:
        rank, local_rank, size, port = (int(os.environ[name]) for name in (*_OF_RANKS, "MASTER_PORT"))
        fit = min(rank, local_rank, port) >= 0 and max(rank, local_rank) < size and os.environ["MASTER_ADDR"] != ""
    except (KeyError, ValueError):
        fit = os.environ.keys().isdisjoint(_OF_RANKS)
    given = [f"{name}={value}" for name, value in os.environ.items() if name in (*_OF_RANKS, *_OF_RANK_0)]
    return None if fit else f"{' '.join(sorted(given))}: {_TOGETHER}"


# --------------------------------------------------------------------------------------------- the end of the launcher


def end_with_launcher() -> None:
    """Have this process stopped (SIGTERM, then `GRACE` seconds) once torchrun, which started it, is gone.

    Call it as early as possible: a launcher that is gone before is not missed. It does nothing without torchrun, and
    nothing a second time.
    """
    if BY_TORCHRUN in os.environ and not _watched:
        _watched.append(os.getppid())
        threading.Thread(target=_watch, name="launcher", daemon=True).start()


def _launcher_is_gone() -> bool:
    return bool(_watched) and os.getppid() != _watched[0]


def _watch() -> None:
    # torchrun forwards SIGTERM, SIGINT, SIGHUP and SIGQUIT to its ranks, but SIGKILL and SIGUSR1 end it alone. A rank
    # is in a session of its own, so that nothing else reaches it: it would go on, unseen, and keep its GPU.
    #
    # A thread that asks for the parent, and not prctl(PR_SET_PDEATHSIG). The kernel sends that when the thread that
    # forked ends, which may be before its process does; it exists on Linux alone; and it is one signal, while a rank
    # whose peers are gone may wait in a collective, where Python runs no handler, and needs an end that asks nobody.
    while not _launcher_is_gone():
        time.sleep(1)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # its waiting is interrupted
    grace = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or GRACE)
    time.sleep(grace)
    with contextlib.suppress(OSError, ValueError):  # the place it wrote to may be gone as well
        print(
            f"[rank {os.environ.get('RANK')}] torchrun is gone, and this did not stop in {grace:g} s", file=sys.stderr
        )
    os._exit(143)


# --------------------------------------------------------------------------------------------- one error, reported once


def record_error(message: str) -> None:
    """Leave the message where torchrun looks for it, so that its own report of the failure ends with it."""
    if (file := _error_file()) is None:
        return
    error = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError, NoSpaceError):
        write_json(file, {"message": error})  # in one step: other ranks read it


def first_rank_reports(message: str) -> bool:
    """Wait until the first rank of this node has recorded the same message; False if it does not, or is this rank.

    torchrun ends all ranks as soon as one fails. A rank that fails faster than the first one would have it killed
    before it says what is wrong and writes STATUS.json. From now on SIGTERM, by which torchrun does so, is ignored.
    """
    if (error_file := _error_file()) is None:
        return False
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    first = error_file.parents[1] / "0" / error_file.name
    deadline = time.monotonic() + PATIENCE
    while first != error_file and time.monotonic() < deadline and not _launcher_is_gone():
        if first.exists():
            return read_json(first)["message"]["message"] == message
        time.sleep(0.02)
    return False


def another_rank_failed() -> bool:
    """Return True if another rank of this node has recorded its error."""
    error_file = _error_file()
    return error_file is not None and any(
        error.parent != error_file.parent for error in error_file.parents[1].glob(f"*/{error_file.name}")
    )


def _error_file() -> Path | None:
    """Return the file of this rank, /tmp/torchelastic_x/RUN_ID/attempt_0/LOCAL_RANK/error.json."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file) if file else None
