"""Signals that stop a run: SIGTERM and SIGUSR1."""

import signal
import threading
from typing import Any, Self

from sftmix.ranks.launcher import another_rank_failed
from sftmix.ranks.world import World
from sftmix.words.errors import Stopped


class StopSignal:
    """A handler that remembers SIGTERM or SIGUSR1, so that the loop can save at the next step boundary.

    If another rank has failed before, no step boundary will come that all ranks reach: it raises Stopped at once.

    received  True once one has arrived, also if another handler received it and nothing came of it: one around this
              one, or one within, after its last look
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # in other threads the caller handles signals
            for number in {signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}:  # Windows has one of them
                self._previous[number] = signal.signal(number, self._arrived)
        around = getattr(self._previous.get(signal.SIGTERM), "__self__", None)
        self._around = around if isinstance(around, StopSignal) else StopSignal()
        self.received |= self._around.received
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._around.received |= self.received and not any(error)  # an error within is what came of it

    def _arrived(self, *_: object) -> None:
        self.received = True
        if another_rank_failed():
            raise Stopped("another rank failed; the same command continues from the last checkpoint")


class StopAtOnce(StopSignal):
    """A handler for work outside the loop, with nothing to save: either signal raises Stopped at once.

    The work may swallow it: a bare `except:`, a callback of C code, a destructor. So it is raised again by `check`, and
    in place of an error that ends the work after the signal.
    """

    def __exit__(self, *error: Any) -> None:
        super().__exit__()
        if self.received and isinstance(error[1], Exception):
            raise Stopped(_STOPPED) from error[1]

    def check(self, world: World) -> None:
        """Raise Stopped on every rank if any rank has received a signal. Call it on every rank."""
        if world.max(float(self.received)):
            raise Stopped(_STOPPED)

    def _arrived(self, *_: object) -> None:
        self.received = True
        raise Stopped(_STOPPED)


class StopLater(StopSignal):
    """A handler around a run directory: what ended its work is written into STATUS.json before a signal counts.

    torchrun ends all ranks so when one fails, of which another may have heard before: the signal arrives as it ends.
    """

    def __exit__(self, *error: Any) -> None:
        super().__exit__()
        if self.received and not any(error):  # nothing came of it
            signal.raise_signal(signal.SIGTERM)

    def _arrived(self, *_: object) -> None:
        self.received = True


_STOPPED = "stopped by a signal; what was finished is kept, the same command continues"
