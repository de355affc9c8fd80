"""Names of checkpoints on disk, which are looked for before torch is imported."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
"""Folder of a stage: the checkpoints to resume from."""
BEST = "best"
"""Folder of a stage: the weights of its best held-out evaluation (checkpoint.keep_best)."""

_NAME = re.compile(r"step-(\d{8})")


def step_path(directory: Path, step: int) -> Path:
    """Return the directory of one checkpoint."""
    return directory / f"step-{step:08d}"


def steps_in(directory: Path) -> list[int]:
    """Return the steps that have a checkpoint directory, newest first, valid or not."""
    names = (_NAME.fullmatch(p.name) for p in directory.glob("step-*") if p.is_dir())
    return sorted((int(m[1]) for m in names if m), reverse=True)
