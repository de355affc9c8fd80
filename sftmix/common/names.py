"""Names that a user or a configuration gives: hub ids, and paths that are written to."""

import os
import re
from pathlib import Path

HUB_ID = re.compile(r"^(?=.{1,96}\Z)(?!\.+(/|\Z))[\w.-]+(/(?!\.+\Z)[\w.-]+)?\Z")
"""`NAME` or `OWNER/NAME` on the Hugging Face hub."""

_URL = re.compile(r"^[A-Za-z][\w+.-]+:/")

_LONGEST = 200
"""Bytes of a name in a path: file systems take 255, and unfinished directories have longer names."""


def path_problem(path: str | os.PathLike[str]) -> str | None:
    """Return why nothing is written under this path, or None: a URL, or control characters in it."""
    name = os.fspath(path)
    if _URL.match(name):
        return "is a URL; name a place on this machine"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "holds a control character; name a place without it"
    if any(len(os.fsencode(part)) > _LONGEST for part in Path(name).parts):
        return f"has a part of more than {_LONGEST} bytes; name a shorter one"
    return None


def is_there(path: str | Path) -> bool:
    """Return True if there is such a file or directory; False for a name that no file can have, too."""
    return os.path.exists(path)
