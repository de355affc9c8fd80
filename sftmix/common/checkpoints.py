"""Names of checkpoints on disk, which are looked for before torch is imported."""

from pathlib import Path

CHECKPOINTS = "checkpoints"
"""Folder of a stage: the checkpoints to resume from."""
BEST = "best"
"""Folder of a stage: the weights of its best held-out evaluation (checkpoint.keep_best)."""


def step_path(directory: Path, step: int) -> Path:
    """Return the directory of one checkpoint."""
    return directory / f"step-{step:08d}"


def steps_in(directory: Path) -> list[int]:
    """Return the steps that have a checkpoint directory, newest first, valid or not."""
    directories = [path for path in directory.glob(f"step-{'[0-9]' * 8}") if path.is_dir()]
    return sorted((int(path.name.removeprefix("step-")) for path in directories), reverse=True)
