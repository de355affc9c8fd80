"""The text of files, in UTF-8."""

import io
import json
from pathlib import Path

from sftmix.disk.regular import regular
from sftmix.words.errors import ConfigError

_LARGEST = 1 << 26
"""Most bytes of a file of a run directory that is read at once."""


def read_text(path: Path) -> str:
    """Return the text of a file of a run directory; raise OSError or ValueError for what no run writes."""
    return decoded(regular(path, _LARGEST).read_bytes())


def text_of(path: Path, option: str) -> str:
    """Return the text of a file that an option names; ConfigError, which begins with the option, for another one."""
    try:
        return decoded(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: {path} cannot be read: {error}") from error


def decoded(data: bytes, errors: str = "strict") -> str:
    """Return the text of a file that somebody named, in UTF-8 with or without a byte order mark; lines end in LF.

    errors  what becomes of bytes that are not UTF-8, as for bytes.decode
    Raises ValueError that names the encoding of UTF-16 and UTF-32, or NULs, or for bytes that are not UTF-8.
    """
    if data.startswith(b"\0\0\0\0"):  # which json takes for UTF-32
        raise ValueError("it has NUL bytes, as a crash leaves behind the last line that was written; remove them")
    encoding = json.detect_encoding(data)  # by the mark, or by the NULs of ASCII in UTF-16: b"{\0"
    if not encoding.startswith("utf-8"):
        raise ValueError(f"it is in {encoding.upper()}; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:  # Excel's CSV, in cp1252
        raise ValueError(f"{error}; save it as UTF-8") from error
    return io.StringIO(text, newline=None).getvalue()  # newline: \r\n, \r -> \n
