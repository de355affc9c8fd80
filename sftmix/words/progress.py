"""The progress of long work on stderr: one live line in a terminal, plain lines in a log file; none of libraries."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from tqdm.auto import tqdm

PAUSE, SHARE, INNER_SHARE = 10.0, 0.01, 0.25
"""Seconds and share of the work after which a log file gets another line, so about a hundred of a run of any length.

Nested bars print at most four lines.
"""


class LogLines(tqdm):
    """Lines like `09:41:07 train 135/1350 (10%), ntp 1.2345, mixup 2.3456, 5,400 tokens/s, 05:02 left`.

    One is due after the first update, at the end, and as the constants above say.
    """

    last_print_n: float

    def update(self, n: float | None = 1) -> None:
        super().update(n)
        # tqdm waits for miniters and mininterval; the first update is shown at once
        if self.leave and self.last_print_n == self.initial and self._time() >= self.start_t + self.delay:
            self.display()

    def display(self, *_: object) -> None:
        """Print a line if something was done since the last one."""
        if self.n > self.last_print_n:
            print(time.strftime("%H:%M:%S"), self, file=sys.stderr, flush=True)
            self.last_print_n, self.last_print_t = self.n, self._time()

    def close(self) -> None:
        """Print the last line, if anything was printed at all."""
        if self.last_print_n > self.initial:
            self.display()
        self.disable = True  # as tqdm's own close, but for its last bar and newline
        self._decr_instances(self)


def progress_bar(
    name: str | None,
    *,
    total: int | None = None,
    unit: str,
    done: int = 0,
    enabled: bool = True,
    leave: bool = True,
    delay: float = 0.0,
    rate: str = ", {rate_noinv_fmt}",
) -> tqdm:
    """Return the progress of work: a live line in a terminal or notebook, else plain lines; nothing without a name.

    Under torchrun rank 0 alone shows any.

    It is a context manager that closes it; `update(n)` notes that n more units are done.

    leave   False for a nested bar: it vanishes, and prints only a few lines if it takes long
    delay   seconds before anything is shown, so that short work shows nothing
    rate    what is shown there for work with a total: a rate, not its inverse, to which a plural would not fit, or
            "{postfix}" for the figures of `set_postfix_str`
    """
    work = {"total": total, "initial": done, "desc": name, "unit": unit, "leave": leave}
    silent = os.environ.get("TQDM_DISABLE") or os.environ.get("RANK", "0") != "0"
    disabled = name is None or not enabled or bool(silent)
    if disabled or sys.stderr.isatty() or "ipykernel" in sys.modules:
        shown = f"{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{remaining}} left{rate}]"
        return tqdm(
            **work,
            delay=delay if leave else 1,
            disable=disabled,
            # and clear to the end of the line: the bar before may have been longer
            bar_format=f"{shown if total else '{desc}: {n_fmt}{unit} [{elapsed}, {rate_noinv_fmt}]'}\x1b[K",
            dynamic_ncols=True,
            position=0,  # inner work takes over the line of the outer, which is not drawn meanwhile
            miniters=1,  # draw by time alone: tqdm's monitor would draw a bar that waits
        )
    shown = f"{{desc}} {{n_fmt}}/{{total_fmt}} ({{percentage:.0f}}%){rate}, {{remaining}} left"
    return LogLines(
        **work,
        delay=delay,
        bar_format=shown if total else "{desc} {n_fmt}{unit}, {rate_noinv_fmt}",
        miniters=max(1, (total or 0) * (SHARE if leave else INNER_SHARE)),
        mininterval=PAUSE,
        maxinterval=float("inf"),  # tqdm's monitor would print as well
        smoothing=0,  # the mean rate since the start, not of the last updates
    )


@contextlib.contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """Silence the bars of transformers while it loads or writes weights; bars of downloads from the hub stay."""
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
