"""Notes of commands on the way, and their results."""

import os
import shlex
import shutil
import sys
import textwrap
from functools import partial
from typing import TextIO

from sftmix.words.shown import as_lines

WHOLE = ("|", "  sftmix ")
"""How lines begin that are not broken: rows of a table, and commands, which are copied."""


def say(text: str, file: TextIO | None = None) -> None:
    """Print on rank 0 only: notes to stderr, or results to the given file. No text controls the terminal."""
    if os.environ.get("RANK", "0") == "0":
        print(as_lines(text), file=file or sys.stderr, flush=True)


def say_wrapped(text: str) -> None:
    """Say a result on stdout, as `for_terminal` has it."""
    say(for_terminal(text, sys.stdout), sys.stdout)


def for_terminal(text: str, file: TextIO) -> str:
    """Return a text whose lines are as wide as the terminal at most; the text itself if the file is no terminal."""
    return wrapped(text, shutil.get_terminal_size().columns) if file.isatty() else text


def as_word(name: object) -> str:
    """Return a name as a word of a command that is copied: quoted, if it has blanks or brackets."""
    return shlex.quote(str(name))


def wrapped(text: str, columns: int) -> str:
    """Return a text whose lines are broken between words; a word that is longer, such as a path, stays whole."""
    fill = partial(textwrap.fill, width=columns, break_long_words=False, break_on_hyphens=False)
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        keep = len(line) <= columns or line.startswith(WHOLE)
        lines.append(line if keep else fill(line.strip(), initial_indent=indent, subsequent_indent=f"{indent}  "))
    return "\n".join(lines)
