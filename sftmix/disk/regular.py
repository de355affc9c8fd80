"""Files of run directories, which may be from anyone: regular ones, and no links."""

import os
from pathlib import Path

from sftmix.words.errors import ConfigError

_runs: set[Path] = set()


def keep_within(run: Path) -> None:
    """Refuse links below a run directory, in this process from now on; the directory itself may be a link."""
    _runs.add(Path(os.path.abspath(run)))
    if os.path.exists(run):  # False, and no error, for a name that no directory can have
        _runs.add(run.resolve())


def refuse_link(path: Path) -> Path:
    """Return a path that is opened or written through; ConfigError if it, or a folder above it, is a link in a run."""
    whole = Path(os.path.abspath(path))
    for run in _runs.intersection(whole.parents):
        for part in (whole, *whole.parents):
            if run in part.parents and os.path.islink(part):
                raise ConfigError(
                    f"{part} is a link, and a run is written and read within its own directory; put what it leads to "
                    f"in its place (cp -rL {part} ...), or take it away"
                )
    return path


def regular(path: Path, most: int | None = None) -> Path:
    """Return the path of a file that is opened; OSError unless it is a regular one of at most `most` bytes, or absent.

    Raises ConfigError as `refuse_link`.
    """
    refuse_link(path)
    if path.exists() and not (path.is_file() and (most is None or path.stat().st_size <= most)):
        size = "" if most is None else f" of at most {most:,} bytes"
        raise OSError(f"it is not a file{size}")  # a pipe would never end
    return path
