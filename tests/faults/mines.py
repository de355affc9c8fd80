"""Faults laid in a process before its command runs: a kill at one file operation, and a file system that is not atomic.

Python announces each file operation to an audit hook before it happens, so that every moment between two of them can be
hit, and nothing in the package knows of it.
"""

import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")


def path_of(event: str, args: tuple) -> str:
    """The path that an audited file operation is about."""
    name = args[0]
    if not isinstance(name, (str, bytes, os.PathLike)):
        return ""
    folder = args[-1] if event in ("os.remove", "os.rmdir") else -1
    path = os.fsdecode(name)
    return path if folder in (-1, None) else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)


def on_file_operations(below: str, act) -> None:
    """Call act(number, event, path), from 1, before each file operation on a path that holds `below`."""
    busy, count = [False], [0]

    def hook(event: str, args: tuple) -> None:
        if event not in FILE_EVENTS or busy[0]:
            return
        busy[0] = True
        try:
            path = path_of(event, args)
            if below in path:
                count[0] += 1
                act(count[0], event, path)
        finally:
            busy[0] = False

    sys.addaudithook(hook)


@dataclass(frozen=True)
class Record:
    """Write down the file operations below a directory, one line each."""

    below: str
    to: str

    def __call__(self) -> None:
        file = os.open(self.to, os.O_WRONLY | os.O_CREAT)

        def act(number: int, event: str, path: str) -> None:
            os.write(file, f"{event} {path}\n".encode())

        on_file_operations(self.below, act)


@dataclass(frozen=True)
class KillAt:
    """A signal to this process before the n-th file operation below a directory."""

    below: str
    number: int
    signal: int = signal.SIGKILL

    def __call__(self) -> None:
        on_file_operations(self.below, lambda n, *_: os.kill(os.getpid(), self.signal) if n == self.number else None)


def itself() -> list[int]:
    return [os.getpid()]


def launcher() -> list[int]:
    """The torchrun that started this rank."""
    return [os.getppid()]


def state_and_parent(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]


def script() -> list[int]:
    """The batch script that started that torchrun."""
    return [int(state_and_parent(os.getppid())[1])]


def gone(pid: int) -> bool:
    try:
        return state_and_parent(pid)[0] == "Z"
    except OSError:
        return True


def everyone() -> list[int]:
    """That torchrun and all its ranks, this one last."""
    parent = os.getppid()
    return [parent, *(pid for pid in children(parent) if pid != os.getpid()), os.getpid()]


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@dataclass(frozen=True)
class KillIn:
    """A signal to this process, some seconds after the n-th call of a function has begun; then again, if asked for.

    file, function  the end of the path of its source, and its name
    whom            returns the processes that get the signal
    """

    file: str
    function: str
    call: int = 1
    after: float = 0.0
    signal: int = signal.SIGKILL
    times: int = 1
    whom: Callable[[], list[int]] = itself

    def __call__(self) -> None:
        seen = [0]

        def profile(frame, event: str, _: object) -> None:
            code = frame.f_code
            if event == "call" and code.co_name == self.function and code.co_filename.endswith(self.file):
                seen[0] += 1
                if seen[0] == self.call:
                    sys.setprofile(None)
                    threading.Thread(target=self._send, daemon=True).start()

        sys.setprofile(profile)

    def _send(self) -> None:
        time.sleep(self.after)
        Path("signalled").write_text(str(time.time()))
        pids = self.whom()
        for _ in range(self.times):
            for pid in pids:
                os.kill(pid, self.signal)
            time.sleep(0.005)  # a run on a fast machine ends in some hundredths


@dataclass(frozen=True)
class CopyingRename:
    """A file system without rename: the new name appears first, in part, and the old one goes last."""

    then: KillAt | Record | None = None

    def __call__(self) -> None:
        os.rename = os.replace = _copy_and_delete
        if self.then is not None:
            self.then()


def _copy_and_delete(source, target, **_: object) -> None:
    if os.path.isdir(source):
        shutil.copytree(source, target, copy_function=_copy_in_two)
        shutil.rmtree(source)
    else:
        _copy_in_two(source, target)
        os.remove(source)


def _copy_in_two(source, target) -> None:
    content = Path(source).read_bytes()
    half = len(content) // 2
    with open(target, "wb") as file:
        file.write(content[:half])
    with open(target, "ab") as file:  # an operation of its own: a kill before it leaves half a file
        file.write(content[half:])


@dataclass(frozen=True)
class Failing:
    """Raise an OSError from the n-th call on, of os.fsync or of os.rename, below a directory."""

    call: str
    code: str
    below: str
    number: int = 1

    def __call__(self) -> None:
        real, count = getattr(os, self.call), [0]

        def failing(subject, *more, **named):
            path = os.readlink(f"/proc/self/fd/{subject}") if isinstance(subject, int) else os.fspath(subject)
            if self.below in path:
                count[0] += 1
                if count[0] >= self.number:
                    number = getattr(errno, self.code)
                    raise OSError(number, os.strerror(number), path)
            return real(subject, *more, **named)

        setattr(os, self.call, failing)


@contextlib.contextmanager
def syncs() -> Iterator[list[tuple[Path, bytes]]]:
    """The list has the files that are synced within, in turn, each with what is in it then: a power cut leaves that."""
    seen, real = list[tuple[Path, bytes]](), os.fsync

    def noting(descriptor: int) -> None:
        real(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_file():
            seen.append((path, path.read_bytes()))

    os.fsync = noting  # type: ignore[assignment]
    try:
        yield seen
    finally:
        os.fsync = real
