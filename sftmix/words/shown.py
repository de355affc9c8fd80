"""Text and figures as messages, terminals and pages show them.

Text that others wrote is shown so that no row and no model can control the terminal. Figures are short, and
counts are in words.
"""

import re

QUOTED_CHARACTERS = 80
"""Most characters of a value that a message quotes."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""A control character, or one that changes the direction of the text behind it."""

_PRINTED = re.compile(r"(\A(?:\n|\x1b\[A)+\Z|\n|\t|\A\r|(?:\r|\x1b\[K *)\Z|\x1b\[0(?:;32)?m)|" + CONTROL.pattern)
"""What is written as it is, in a group, or else a control character."""

SEEN = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f"
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    r"\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    r"\u2800\ufff9-\ufffb]"
)
"""A character that shows something: no white space, no control character, none of Default_Ignorable_Code_Point (the
second and third line, of DerivedCoreProperties.txt of Unicode), not the blank of braille or an annotation's mark."""


def quoted(value: object) -> str:
    """Quote a value for a message: on one line, without control characters, and cut if it is long."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """Return a text, cut if it is long: an error of a stranger's code may quote a whole row."""
    return text if len(text) <= QUOTED_CHARACTERS else f"{text[: QUOTED_CHARACTERS - 3]}..."


def visible(text: str) -> bool:
    """Return True if a text has a character that is seen."""
    return SEEN.search(text) is not None


def printable(text: str) -> str:
    """Make visible what is not, such as control characters and spaces without width; newlines and tabs stay."""
    # a space of no width -> \u200b
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def as_lines(text: str, but: str = "\n\t") -> str:
    """Make control characters visible, all but some of them; what some scripts need, such as joiners, stays."""
    # "\x1b[2J", which clears a terminal -> "\\x1b[2J"
    return CONTROL.sub(lambda match: match[0] if match[0] in but else repr(match[0])[1:-1], text)


def as_printed(text: str) -> str:
    """Make control characters visible, all but those of bars and of our colours.

    A bar begins with a carriage return, and ends with one or by clearing its line; for bars above each other the cursor
    goes up by itself. Green and its end are what `preview` writes.
    """
    return _PRINTED.sub(lambda match: match[0] if match[1] is not None else repr(match[0])[1:-1], text)


_COMPUTED = re.compile(r"'*[-=+@\t\r]")
"""The beginning of a cell that a spreadsheet computes, with marks in front of it that hinder it."""


def as_cell(text: str) -> str:
    """Return a text as the cell of a table that no spreadsheet computes; `of_cell` reads it back."""
    return f"'{text}" if _COMPUTED.match(text) else text  # =HYPERLINK("http://...") -> '=HYPERLINK("http://...")


def of_cell(text: str) -> str:
    return text[1:] if text[:1] == "'" and _COMPUTED.match(text) else text


def short(value: float, *, digits: int = 4) -> str:
    """Return a number with so many digits, with all of the whole ones below ten million: -0.312, -40.2, -167,800."""
    return f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e7 else f"{value:,.{digits}g}"


def counted(n: int, noun: str) -> str:
    """Return `1 step`, `2 steps` or `1,000 steps`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
