"""Files that grow by batches of records, each of which is there whole or not at all."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.disk.files import hashed, naming_full_disk, read_object
from sftmix.disk.regular import regular
from sftmix.words.errors import DifferenceError


def read_batches(file: Path) -> list[dict[str, Any]]:
    """Return what `append_batch` has added to a file of this name so far; what is damaged is left out.

    A last batch that was cut short is dropped in silence, others with a warning.
    """
    if not file.exists():
        return []
    # what is behind the last newline was cut short: without it the next batch would begin in the middle of a line
    whole, newline, _ = regular(file).read_bytes().rpartition(b"\n")
    os.truncate(file, len(whole) + len(newline))
    records = list[dict[str, Any]]()
    damaged = 0
    for line in whole.splitlines():
        try:
            batch = read_object(line, file, file=str, records=list, sha256=str)
            if batch["file"] != file.name:
                raise DifferenceError("it is of another file")
            records += batch["records"]
        except DifferenceError:
            damaged += 1
    if damaged:
        warnings.warn(f"{damaged} lines of {file} are not as they were written, and are made again", stacklevel=2)
    return records


def append_batch(file: Path, batch: Sequence[Mapping[str, Any]]) -> None:
    """Add a batch of records to a file, all or none, whatever becomes of this process.

    It does not wait for the disk, which at each row would be slower than a server; a power cut may cost the last ones.
    """
    with naming_full_disk(file), regular(file).open("ab") as part:
        # {"file": "answers.jsonl.parts", "records": [...], "sha256": "..."}
        part.write(f"{json.dumps(hashed({'file': file.name, 'records': batch}))}\n".encode())
