"""The progress bar of long work."""

from __future__ import annotations

import sys

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
