"""A bound on the processor time of a call, which ends it from outside.

It holds in the main thread of a process of Linux or macOS, between two steps of Python: a single one that takes long,
such as 9 ** 9 ** 9, ends first.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

TICK = 0.25
"""Seconds of the process's time as a user after which the clock looks at the call under way."""


class OutOfTime(BaseException):
    """A call has used up its time.

    No Exception: it is raised in the middle of whatever runs, and code that catches every Exception would go on.
    """


class Clock:
    """Ends calls that take too long. To start and stop it costs more than a short call, so one start may serve many.

    thread  the one in which it runs, or None
    left    seconds that the call under way has; None: there is none
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self.left: float | None = None

    def _tick(self, *_: object) -> None:
        if self.left is not None:
            self.left -= TICK
            if self.left < 0:
                raise OutOfTime  # and again at the next tick: within a __del__ it would be lost

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run while the block does. Elsewhere than in the main thread, or on Windows, nothing is bounded."""
        thread = threading.get_ident()
        if self.thread is not None or thread != threading.main_thread().ident or not hasattr(signal, "setitimer"):
            yield
            return
        before = signal.signal(signal.SIGVTALRM, self._tick)
        self.thread = thread
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, TICK, TICK)
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            self.thread = None
            signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)  # None: no handler of Python

    def call(self, seconds: float, function: Callable[..., Any], **given: Any) -> Any:
        """Return function(**given). Raises OutOfTime if it takes more than so many seconds, and a tick."""
        with nullcontext() if self.thread else self.running():
            if self.thread == threading.get_ident():
                self.left = seconds
            try:
                return function(**given)
            finally:
                self.left = None


CLOCK = Clock()
