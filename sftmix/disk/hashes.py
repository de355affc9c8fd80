"""Hashes of files and of values."""

import hashlib
import json
from pathlib import Path

from sftmix.disk.regular import regular


def sha256_file(path: Path, size: int | None = None) -> str:
    """Return the hash of a file, or of its first `size` bytes."""
    with regular(path).open("rb") as f:
        digest = hashlib.file_digest(f, "sha256") if size is None else hashlib.sha256(f.read(size))
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """Return the hash of a JSON-able value; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
