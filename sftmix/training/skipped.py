"""How many steps may be skipped because a loss or a gradient is not finite."""

from __future__ import annotations

MAX_IN_A_ROW = 3
"""Consecutive steps that may be skipped; one more stops the run with exit code 6."""
MAX_SHARE = 0.01
"""Share of the steps so far that may be skipped; a run in which more are stops with exit code 6, too."""
FEW = 9
"""Skipped steps up to which no share is taken: one of the first ten would be 10%."""


def too_many_skipped(in_a_row: int, skipped: int, steps: int) -> str:
    """Return the skipped steps that end the run, in words; empty text if it goes on.

    in_a_row, skipped  the last ones, and all, among the first `steps` steps
    """
    if in_a_row > MAX_IN_A_ROW:
        return f"{in_a_row} steps in a row"
    if skipped > FEW and skipped > MAX_SHARE * steps:
        return f"{skipped} of the first {steps} steps, more than {MAX_SHARE:.0%},"
    return ""
