"""The directory of tokenised rows, under keys that change with everything they depend on (never with file times)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, NoSpaceError

CODE_VERSION = 1
"""Part of every key: raise it whenever the same rows, tokenizer and options would give other tokens or ids."""


def cache_root(cache_dir: str | None) -> Path:
    """`cache_dir`, else $SFTMIX_CACHE, else ~/.cache/sftmix."""
    return Path(cache_dir or os.environ.get("SFTMIX_CACHE") or "~/.cache/sftmix").expanduser()


def key_of(*parts: Any) -> str:
    """Hex digest of JSON-able parts."""
    text = json.dumps([CODE_VERSION, *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def get_or_build(root: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Return the directory `root/name` and its summary, building it when it is absent or incomplete.

    `build(directory)` writes files and returns a JSON-able summary. The directory is built under another name and
    renamed when complete, so a reader (or another process that builds the same key) never sees half of it.
    """
    target = root / name
    if (summary := _read(target)) is not None:
        return target, summary
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        try:
            return _commit(scratch, target, build(scratch))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(
            f"cannot write the tokenisation cache under {root}: {error.strerror or error}. "
            "Free some space there, or choose another place with --data.cache_dir or $SFTMIX_CACHE."
        ) from error


def _commit(scratch: Path, target: Path, summary: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    sizes = {file.name: file.stat().st_size for file in sorted(scratch.iterdir())}
    (scratch / "summary.json").write_text(json.dumps({"sizes": sizes, "summary": summary}), encoding="utf-8")
    if target.exists() and _read(target) is None:
        shutil.rmtree(target)
    try:
        scratch.rename(target)
    except OSError:
        if _read(target) is None:  # not another process that finished the same key first
            raise
    return target, summary


def _read(target: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads((target / "summary.json").read_text(encoding="utf-8"))
        if all((target / name).stat().st_size == size for name, size in stored["sizes"].items()):
            return dict(stored["summary"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or incomplete: it is built anew
    return None
