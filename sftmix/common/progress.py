"""The progress bar of long work; and none of transformers, which takes seconds where it shows one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from tqdm.auto import tqdm


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
) -> tqdm:
    """Return a bar on stderr: live on a terminal, one line every ten seconds in a log file, none without a name."""
    pause = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit=unit,
        unit_scale=unit_scale,
        leave=leave,
        delay=delay if leave else 1,
        disable=not enabled or name is None,
        dynamic_ncols=True,
        mininterval=pause,
        maxinterval=max(10.0, pause),
    )


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
