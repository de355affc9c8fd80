"""Names of places: paths that can be written, hub ids, and where the relative names of an option begin."""

import glob
import os
import re
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from sftmix.words.errors import ConfigError

PathLike = str | os.PathLike[str]

# gpt2, meta-llama/Llama-3.2-1B; not ../x, a/.., a/b/c or a name that ends in a newline
HUB_ID = re.compile(r"^(?=.{1,96}\Z)(?!\.+(/|\Z))[\w.-]+(/(?!\.+\Z)[\w.-]+)?\Z")
"""`NAME` or `OWNER/NAME` on the Hugging Face hub."""

_NO_PLACE = {
    r"^[A-Za-z][\w+.-]+:/": "is a URL; name a place on this machine",  # s3://bucket/x; not C:/x, of one letter
    # runs/$NAME, runs/${NAME}; not cost-5$/run
    r"\$[\w{]": "holds a variable, which the shell replaces and a file does not; write the place itself",
    r"[\x00-\x1f\x7f]": "holds a control character; name a place without it",
}
"""Patterns of names under which nothing is written, and why."""
_LONGEST = 200
"""Bytes of a name in a path: file systems take 255, and unfinished directories have longer names."""


def path_problem(path: PathLike) -> str | None:
    """Return why nothing is written under this path, or None: a URL, a variable, a control character, a long part."""
    for pattern, problem in _NO_PLACE.items():
        if re.search(pattern, os.fspath(path)):
            return problem
    if any(len(os.fsencode(part)) > _LONGEST for part in Path(path).parts):
        return f"has a part of more than {_LONGEST} bytes; name a shorter one"
    return None


is_there = os.path.exists
"""True if there is such a file or directory; also False for a name that no file can have."""


class OutsideError(ConfigError):
    """A name in the configuration of a stranger's run that leads out of the run's directory."""


class Origin(NamedTuple):
    """What the names in a configuration mean.

    starts  directories in which relative ones begin; "": here
    model   what a hub id means, as NAME@COMMIT
    given   names of the command line, which begin here, and open any place
    within  the directory of a stranger's run, which alone its other names open; None: they open any place
    """

    starts: Sequence[PathLike] = ("",)
    model: str = ""
    given: Collection[Path] = ()
    within: Path | None = None


started: ContextVar[Origin] = ContextVar("started", default=Origin())  # noqa: B039  # nothing in it is changed
"""Where the configuration that is read was started, and by whom."""


def place_of(name: PathLike) -> Path:
    """Return the place of a file or directory that an option names: whatever opens one asks here; `~` is the home.

    Raises OutsideError if a stranger's run names it, and it is no file or directory in the run. So a hub id of such a
    run is not looked up.
    """
    origin = started.get()
    starts = [""] if Path(name) in origin.given else origin.starts
    places = [Path(start, os.path.expanduser(name)) for start in starts]  # /data/x has no start
    place = next(filter(is_there, places), places[0])
    in_run = origin.within and place.resolve().is_relative_to(origin.within)
    if not (in_run and (place.is_file() or place.is_dir())):  # a pipe would never end
        refuse_stranger(name)
    return place


def refuse_stranger(name: PathLike) -> str:
    """Return a name; OutsideError if a stranger's run names it, and not the command line."""
    origin = started.get()
    if origin.within and Path(name) not in origin.given:
        raise OutsideError(
            f"{str(name)!r} is not in {origin.within}, which is not a run of yours, so it is not opened. Name what the "
            "command needs, --data.train, --data.eval or --model.path, or add --trust, which treats the run as your "
            "own. If it is yours, of another machine or container, let SFTMIX_STATE name the state directory of then"
        )
    return str(name)


def is_outside(name: PathLike) -> bool:
    """Return True for a name that `place_of` refuses."""
    try:
        place_of(name)
    except OutsideError:
        return True
    return False


def cache_root(cache_dir: str | None = None) -> Path:
    """Return the directory of the cache: `cache_dir`, else $SFTMIX_CACHE, else ~/.cache/sftmix."""
    return Path(cache_dir or os.environ.get("SFTMIX_CACHE") or "~/.cache/sftmix").expanduser()


def places_like(pattern: str) -> list[str]:
    """Return the places that a pattern of `glob` matches, looked for where `place_of` looks; in no stranger's run.

    A pattern that is there as it is, as sweep[1]/model, is no pattern.
    """
    origin, name = started.get(), os.path.expanduser(pattern)
    if origin.within:
        return []
    itself = (os.path.join(start, name) for start in origin.starts)
    if place := next(filter(is_there, itself), None):
        return [place]
    found = (glob.glob(os.path.join(glob.escape(os.fspath(start)), name)) for start in origin.starts)
    return next(filter(None, found), [])


def unwritable(place: PathLike, *, folder: bool = False) -> str | None:
    """Return why nothing can be written there, or None. `folder`: a directory is made of it, or it is one."""
    if problem := path_problem(place):
        return problem
    path = Path(place)
    existing = next(part for part in (path, *path.parents) if os.path.exists(part))
    # a_file/x is below a file; a_file itself may be replaced
    fits = existing.is_dir() or (existing == path and existing.is_file() and not folder)  # /dev/null would be replaced
    if fits and os.access(existing, os.W_OK):
        return None
    return f"cannot be written: {existing} is a file, or not yours to write; name a place in a directory of yours"


def commit_of(name: str) -> str | None:
    """Return the commit that was recorded for a hub id; None: the newest commit."""
    recorded, _, commit = started.get().model.rpartition("@")
    return commit if recorded == name else None
