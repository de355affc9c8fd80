"""stdout and stderr of a command's process: its work goes on when nobody takes what it says any more."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from sftmix.common.errors import OUTPUT_CLOSED, NoSpaceError


class Output(io.FileIO):
    """A descriptor whose writes do not fail. What cannot be written is lost, and `code` is the exit code for that."""

    code = 0

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.code = OUTPUT_CLOSED if isinstance(error, BrokenPipeError) else NoSpaceError.exit_code
            return len(data)


def outlast_readers() -> list[Output]:
    """Put such outputs in the places of stdout and stderr, and return them."""
    outputs = []
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        closed = getattr(sys, name) is None  # by who started this: what is opened next has its descriptor
        output = Output(os.devnull if closed else descriptor, "w", closefd=closed)
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(output), errors="backslashreplace", line_buffering=True))
        outputs.append(output)
    return outputs
