"""The lock of a run directory, and STATUS.json: which process uses it, how far it is, and how it ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sftmix.common.errors import ConfigError, DifferenceError, InUseError, NoSpaceError, exit_code_of
from sftmix.common.files import read_json, write_json
from sftmix.common.names import path_problem

BEFORE_STAGES = ("start", "data")
"""Values of `stage` in STATUS.json before a command begins to make its first one."""


class Hold:
    """`with Hold(path) as hold:` keeps other processes out; an error that leaves the block is told in STATUS.json.

    The STATUS.json of a run that has come as far as a stage stays, until a command begins to make a stage or has read
    back an unfinished run to its end.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._status: dict[str, Any] = {"stage": BEFORE_STAGES[0], "step": 0, "total_steps": 0, "exit_code": None}
        self._earlier: dict[str, Any] = {}
        """The STATUS.json of another process, while it stays."""
        self._written = 0.0

    def take(self) -> None:
        """Take the lock. Raises ConfigError for a path that cannot be a run directory, InUseError if it is taken."""
        if problem := path_problem(self.path):
            raise ConfigError(f"out: {str(self.path)!r} cannot be a run directory: it {problem}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise ConfigError(f"out: {self.path} cannot be a run directory: {error.strerror or error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise InUseError(f"another process is using {self.path}; wait for it, or choose another --out") from None
        self._lock, self._status["started"] = lock, time.time()
        with contextlib.suppress(DifferenceError):  # none, or one that cannot be read
            earlier = read_json(self.path / "STATUS.json")
            self._earlier = earlier if earlier.get("stage") not in (None, *BEFORE_STAGES) else {}

    def __enter__(self) -> Hold:
        self.take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release(error)

    def status(self, *, throttle: float = 0.0, **fields: Any) -> None:
        """Update STATUS.json; with `throttle`, at most once in so many seconds."""
        self._status |= {**fields, "updated": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
        if not self._earlier and time.monotonic() - self._written >= throttle:
            write_json(self.path / "STATUS.json", self._status)
            self._written = time.monotonic()

    def begin(self) -> None:
        """Note that a stage begins to be made: from now on STATUS.json tells of this process."""
        self._earlier = {}

    def done(self) -> None:
        """Note that the command did all it should."""
        if self._earlier.get("exit_code") != 0:
            self.begin()
        self.status(exit_code=0, message="")

    def release(self, error: BaseException | None = None) -> None:
        """Note the error that ended the command, if any, and give the lock back."""
        if error is not None:
            with contextlib.suppress(NoSpaceError):  # it would hide the error that is told of
                self.status(exit_code=exit_code_of(error), message=f"{type(error).__name__}: {error}")
        if self._lock is not None:
            self._lock.close()
