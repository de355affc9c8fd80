"""Text that others wrote, as messages and terminals show it: no row and no model can control the terminal."""

import re

QUOTED_CHARACTERS = 80
"""Most characters of a value that a message quotes."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""A control character."""


def quoted(value: object) -> str:
    """Quote a value for a message: on one line, without control characters, and cut if it is long."""
    text = repr(value)
    return text if len(text) <= QUOTED_CHARACTERS else f"{text[: QUOTED_CHARACTERS - 3]}..."


def printable(text: str) -> str:
    """Make visible what is not, such as control characters and spaces without width; newlines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Make control characters visible, newlines and tabs, too; no other character changes."""
    return as_lines(text, but="")


def as_lines(text: str, but: str = "\n\t") -> str:
    """Make control characters visible, all but newlines and tabs; what some scripts need, such as joiners, stays."""
    return CONTROL.sub(lambda match: match[0] if match[0] in but else repr(match[0])[1:-1], text)
