"""Reading of text files in pieces, so that no file is ever in memory as a whole."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

from sftmix.data.jsonrows import BadRow, foreign_encoding


def iter_text(path: Path, name: str) -> Iterator[str]:
    """Read the text of a file in pieces of at most 64 Ki characters, with LF for CRLF and CR, without byte order mark.

    Raises BadRow with the first line that is not UTF-8 text.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    line = 1
    with open(path, "rb") as file:
        if problem := foreign_encoding(file.read(4)):
            raise BadRow(problem, f"{name}:1")
        file.seek(0)
        while True:
            raw = file.read(1 << 16)
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                reason = f"not valid UTF-8: byte 0x{error.object[error.start]:02x}; save the file as UTF-8"
                raise BadRow(reason, f"{name}:{line}") from error
            if (zero := raw.find(b"\0")) >= 0:
                line += raw[:zero].count(b"\n")
                raise BadRow("contains a NUL character", f"{name}:{line}")
            line += raw.count(b"\n")
            if not raw:
                return
