"""Signals that stop a run: SIGTERM and SIGUSR1, for which a process has one handler, with the mode of the work."""

import signal
import threading
from typing import Any, Literal, Self

from sftmix.ranks.launcher import another_rank_failed
from sftmix.ranks.world import World
from sftmix.words.errors import Stopped

Mode = Literal["later", "at_once", "at_step"]


class _Now(threading.local):
    """The mode of the innermost work, "" outside all; whether a signal has arrived since the outermost began."""

    mode: str = ""
    received = False


_NOW = _Now()


class StopSignal:
    """`with StopSignal(mode) as stop:` says what a signal does to the work within; work within it may say otherwise.

    later    around a run directory: what ended the work is written into STATUS.json before a signal counts. torchrun
             ends all ranks so when one fails, of which another may have heard before: the signal arrives as it ends.
    at_once  work outside the loop, with nothing to save: Stopped is raised. The work may swallow it: a bare `except:`,
             a callback of C code, a destructor. So it is raised again by `check`, and in place of an error that ends
             the work after the signal.
    at_step  the loop: it looks at `received`, and saves at the next step boundary. If another rank has failed before,
             no step boundary will come that all ranks reach: Stopped is raised at once.

    A signal that has ended nothing is passed on to the enclosing block.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode

    @property
    def received(self) -> bool:
        """True once a signal has arrived, also in work around this one, or within."""
        return _NOW.received

    def __enter__(self) -> Self:
        self._around, self._before, self._previous = _NOW.mode, _NOW.received, dict[int, Any]()
        _NOW.mode = self.mode
        # In other threads the caller handles signals.
        if not self._around and threading.current_thread() is threading.main_thread():
            for number in {signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}:  # Windows has one of them
                self._previous[number] = signal.signal(number, _arrived)
        return self

    def __exit__(self, *raised: Any) -> None:
        _NOW.mode, error = self._around, raised[1]
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        received = _NOW.received
        if not self._around or (self.mode == "at_step" and error):  # an error within is what came of the signal
            _NOW.received = self._before
        if received and self.mode == "at_once" and isinstance(error, Exception):
            raise Stopped(_STOPPED) from error
        if received and self.mode == "later" and not error:  # nothing came of it
            signal.raise_signal(signal.SIGTERM)

    def check(self, world: World) -> None:
        """Raise Stopped on every rank if any rank has received a signal. Call it on every rank."""
        if world.max(float(self.received)):
            raise Stopped(_STOPPED)


def _arrived(*_: object) -> None:
    _NOW.received = True
    if _NOW.mode == "at_once":
        raise Stopped(_STOPPED)
    if _NOW.mode == "at_step" and another_rank_failed():
        raise Stopped("another rank failed; the same command continues from the last checkpoint")


_STOPPED = "stopped by a signal; what was finished is kept, the same command continues"
