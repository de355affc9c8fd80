"""The lock of a run directory, and STATUS.json: which process uses it, how far it is, and how it ended."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sftmix.common.errors import ConfigError, InUseError, exit_code_of
from sftmix.common.files import read_json, write_json


class Hold:
    """`with Hold(path) as hold:` keeps other processes out; an error that leaves the block is told in STATUS.json.

    The STATUS.json of a finished run stays as it is until a stage begins to be made (`begin`). So a command that is
    refused, only reads back, or is interrupted while it reads leaves a finished run as it was.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._status: dict[str, Any] = {}
        self._keeps = False
        self._written = 0.0

    def take(self) -> None:
        """Take the lock. Raises ConfigError for a path that cannot be a run directory, InUseError if it is taken."""
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
        self._lock = lock
        self._keeps = _finished(self.path / "STATUS.json")
        self._status = {"stage": "start", "step": 0, "total_steps": 0, "exit_code": None, "started": time.time()}

    def __enter__(self) -> Hold:
        self.take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release(error)

    def status(self, *, throttle: float = 0.0, **fields: Any) -> None:
        """Update STATUS.json; with `throttle`, at most once in so many seconds."""
        self._status |= {**fields, "updated": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
        if not self._keeps and time.monotonic() - self._written >= throttle:
            write_json(self.path / "STATUS.json", self._status)
            self._written = time.monotonic()

    def begin(self) -> None:
        """Note that a stage begins to be made: from now on STATUS.json tells of this process."""
        self._keeps = False

    def release(self, error: BaseException | None = None) -> None:
        """Note the error that ended the command, if any, and give the lock back."""
        if error is not None:
            self.status(exit_code=exit_code_of(error), message=f"{type(error).__name__}: {error}")
        if self._lock is not None:
            self._lock.close()


def _finished(status: Path) -> bool:
    """Return True if STATUS.json says that the last command ended well."""
    try:
        told = read_json(status)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(told, dict) and told.get("exit_code") == 0
