"""Notes of commands on the way, and their results."""

import os
import sys
from typing import TextIO

from sftmix.words.shown import as_lines


def say(text: str, file: TextIO | None = None) -> None:
    """Print on rank 0 only: notes to stderr, or results to the given file. No text controls the terminal."""
    if os.environ.get("RANK", "0") == "0":
        print(as_lines(text), file=file or sys.stderr, flush=True)
