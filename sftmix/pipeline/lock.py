"""The lock of a run directory, one process at a time, and STATUS.json, which says what that process does."""

import contextlib
import math
import os
import socket
import time
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, SoftFileLock, Timeout

from sftmix.disk.files import NOT_SUPPORTED, STARTED, read_json, remove_leftovers, write_json
from sftmix.disk.places import PathLike, path_problem
from sftmix.disk.regular import refuse_link
from sftmix.words.ends import end_of
from sftmix.words.errors import ConfigError, DifferenceError, InUseError, NoSpaceError


class Hold:
    """`with Hold(path) as hold:` keeps other processes out; an error that leaves the block is noted in STATUS.json.

    The STATUS.json of an earlier command is kept until this command begins to make a stage, or has read all stages
    back.

    Under torchrun, the first process does all this.
    """

    def __init__(self, path: PathLike) -> None:
        import psutil

        self.path, self._main = Path(path), os.environ.get("RANK", "0") == "0"
        self._lock: FileLock | SoftFileLock = FileLock(self.path / ".lock")
        self._status: dict[str, Any] = {
            "stage": "start",
            "step": 0,
            "total_steps": 0,
            "exit_code": None,
            "message": None,
            "started": time.time(),
            "pid": os.getpid(),
            "created": psutil.Process().create_time(),  # another process may have the number later
            "host": socket.gethostname(),
        }
        self._told = -math.inf
        """time.monotonic() of the last update: the clock of the machine may step back."""
        self._earlier: dict[str, Any] = {}
        """The STATUS.json of another process, while it stays."""

    def __enter__(self) -> Self:
        """Take the lock. Raises ConfigError for a directory that cannot be written, InUseError if it is taken."""
        if not self._main:
            return self
        if problem := path_problem(self.path):
            raise ConfigError(f"out: {str(self.path)!r} cannot be a run directory: it {problem}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (".lock", ".lock.held"):
                refuse_link(self.path / name)
            self._take_lock()
        except Timeout:
            raise InUseError(
                f"another process is using {self.path}; wait for it, or use another directory (where a file system has "
                f"no locks, the file {self._lock.lock_file} of a killed one stays: delete it if there is none)"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"{self.path} cannot be written: {reason}; use a directory of yours") from error
        # What kills left at the top: a stage tidies its own directory. "nonce" is the file of check_same_directory.
        for name in ("STATUS.json", "config.yaml", STARTED, "summary.json", "nonce"):
            remove_leftovers(self.path, name)
        with contextlib.suppress(DifferenceError):  # none, or one that cannot be read
            earlier = read_json(self.path / "STATUS.json", stage=str)
            if earlier["stage"] not in ("start", "data"):  # as before a command begins to make its first stage
                self._earlier = earlier
        return self

    def _take_lock(self) -> None:
        """Take the lock; if the file system has none, use a second file instead, as FileLock does after ENOSYS."""
        try:
            self._lock.acquire(blocking=False)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            self._lock = SoftFileLock(self.path / ".lock.held")
            self._lock.acquire(blocking=False)

    def __exit__(self, *raised: Any) -> None:
        """Note the error that ended the command, if any, and give the lock back."""
        if (error := raised[1]) is not None:
            with contextlib.suppress(NoSpaceError, DifferenceError):  # they would hide the error itself
                end = end_of(error)
                self.status(exit_code=end.code, message=end.words)
        self._lock.release()

    def status(self, *, throttle: float = 0.0, **fields: Any) -> None:
        """Update STATUS.json; with `throttle`, at most once in so many seconds.

        Raises DifferenceError if the directory was moved or removed: what is written would make a new one in its place;
        or if its lock was, without which another command would begin to write here.
        """
        if self._lock.is_locked and not (self.path / ".lock").exists():  # other ranks hold none
            gone = self.path / ".lock" if self.path.exists() else self.path
            raise DifferenceError(f"{gone} was moved or removed while it was used; continue the run where it is now")
        self._status |= fields
        now = time.monotonic()
        if self._main and not self._earlier and now - self._told >= throttle:
            self._told, self._status["updated"] = now, time.time()
            write_json(self.path / "STATUS.json", self._status)

    def starts_work(self) -> None:
        """Note that something is about to be made here: from now on STATUS.json is about this process."""
        self._earlier = {}
