"""A bound on the processor time of rendering, for templates that behave well on the trial and badly on a row."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 30.0
"""Processor time of a call, whatever it renders."""
SECONDS_PER_TURN = 0.01
"""On top of that: long conversations with many trained turns take theirs."""


class TookTooLong(BaseException):
    """The end of a rendering. It is no Exception, so that nothing on the way takes it for an error of a row."""


def seconds_for(turns: int) -> float:
    """Return the processor time, in seconds, that rendering this many turns may take."""
    return SECONDS + SECONDS_PER_TURN * turns


@contextmanager
def bounded(turns: int) -> Iterator[None]:
    """Raise TookTooLong inside the block after the processor time for this many turns.

    It works in the main thread, where Python handles signals. It comes between two steps of Python: one long step in
    C, as a text of gigabytes is, ends first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds_for(turns))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _end(number: int, frame: FrameType | None) -> None:
    raise TookTooLong
