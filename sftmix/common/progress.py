"""The progress of long work on stderr: one live line in a terminal, plain lines in a log file; none of libraries."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from tqdm.auto import tqdm

SHARE, MIN_PAUSE = 0.05, 1.0
"""Share of the work, and seconds since the last line of a log file, after which another one is due."""
PAUSE, LONG_SHARE, INNER_SHARE = 30.0, 0.025, 0.25
"""Seconds after which a line is due sooner: after this share of long work, or of work inside other work. So a run of
any length leaves about a hundred lines."""

_CLEAR = "\x1b[K"  # to the end of the line: the bar before may have been longer
_RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}]" + _CLEAR
_FIGURES = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]" + _CLEAR
_NO_TOTAL = "{desc}: {n_fmt}{unit} [{elapsed}, {rate_fmt}{postfix}]" + _CLEAR


class Progress(Protocol):
    """The progress of some work, as `progress_bar` returns it; also a context manager that closes it."""

    def show(self, figures: str) -> None:
        """Show these figures from the next update on, in place of the rate."""
        ...

    def update(self, n: int = 1) -> Any:
        """Note that `n` more units are done."""
        ...

    def close(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...


def progress_bar(
    name: str | None,
    *,
    total: int | None = None,
    unit: str,
    done: int = 0,
    enabled: bool = True,
    leave: bool = True,
    delay: float = 0.0,
    unit_scale: bool = False,
) -> Progress:
    """Return the progress of work: a live line in a terminal or notebook, else plain lines; nothing without a name.

    leave   False for work inside other work: its bar vanishes, and of its lines there are only a few if it is long
    delay   seconds before anything is shown, so that short work shows nothing
    """
    enabled = enabled and name is not None
    if enabled and not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return LogLines(name or "", total=total, unit=unit, done=done, leave=leave, delay=delay, unit_scale=unit_scale)
    return LiveLine(
        total=total,
        initial=done,
        desc=name,
        unit=unit,
        unit_scale=unit_scale,
        leave=leave,
        delay=delay if leave else 1,
        disable=not enabled,
        bar_format=_NO_TOTAL if total is None else _RATE,
        dynamic_ncols=True,
        position=0,  # inner work takes over the line of the outer, which is not drawn meanwhile
        miniters=1,  # draw by time alone: tqdm's monitor would draw a bar that waits
        mininterval=0.1,
    )


class LiveLine(tqdm):
    """A line of the terminal that is drawn again and again."""

    def show(self, figures: str) -> None:
        if not self.disable:
            self.bar_format = _NO_TOTAL if self.total is None else _FIGURES
            self.set_postfix_str(figures, refresh=False)


class LogLines:
    """Lines like `09:41:07 train 135/1350 (10%), ntp 1.2345, mixup 2.3456, 5,400 tokens/s, 05:02 left`.

    One is due after the first update, after the last, and as the constants above say.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int | None,
        unit: str,
        done: int = 0,
        leave: bool = True,
        delay: float = 0.0,
        unit_scale: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._unit, self._scaled = name, total, unit.strip(), unit_scale
        self._done = self._began_at = self._told = done
        self._leave, self._delay, self._clock = leave, delay, clock
        self._started = self._last = clock()
        self._lines = 0
        self._figures = ""

    def __enter__(self) -> LogLines:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def show(self, figures: str) -> None:
        self._figures = figures

    def update(self, n: int = 1) -> None:
        self._done += n
        now = self._clock()
        if self._due(now):
            self._write(now)

    def close(self) -> None:
        """Write the last line, if the work was told of at all."""
        if self._lines and self._told != self._done:
            self._write(self._clock())

    def _due(self, now: float) -> bool:
        pause, total = now - self._last, self._total
        share = 1.0 if not total else (self._done - self._told) / total
        if pause >= PAUSE and share >= (LONG_SHARE if self._leave else INNER_SHARE):
            return True
        if not self._leave or now - self._started < self._delay:
            return False
        if not self._lines or self._done == self._total:
            return True
        return total is not None and pause >= MIN_PAUSE and share >= SHARE

    def _write(self, now: float) -> None:
        rate = (self._done - self._began_at) / max(now - self._started, 1e-9)
        shown = self._figures or f"{self._amount(rate)}/s"
        parts = [f"{time.strftime('%H:%M:%S')} {self._name} {self._place()}", shown]
        if self._total is not None and rate:
            parts.append(f"{tqdm.format_interval(max(self._total - self._done, 0) / rate)} left")
        print(", ".join(parts), file=sys.stderr, flush=True)
        self._lines, self._last, self._told = self._lines + 1, now, self._done

    def _place(self) -> str:
        if self._total is None:
            return self._amount(self._done)
        return f"{self._number(self._done)}/{self._number(self._total)} ({100 * self._done // max(self._total, 1)}%)"

    def _amount(self, value: float) -> str:
        return f"{self._number(value)}{'' if self._scaled else ' '}{self._unit}"

    def _number(self, value: float) -> str:
        """Return 12.3M where units are scaled, else digits; a rate below ten with two decimals."""
        if self._scaled:
            return str(tqdm.format_sizeof(value))
        return f"{value:.2f}" if isinstance(value, float) and value < 10 else f"{value:.0f}"


@contextlib.contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """Silence the bars of transformers while it loads or writes weights; those of downloads from the hub stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled() or are_progress_bars_disabled():
        yield  # all of them are off, or set apart from each other, which its switch below cannot restore
        return
    logging.disable_progress_bar()
    enable_progress_bars()
    try:
        yield
    finally:
        logging.enable_progress_bar()
