"""Files and directories that appear whole or not at all, with a manifest of hashes.

Beside them, the files of a stage that several rooms read.
"""

import errno
import glob
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sftmix.disk.hashes import sha256_file, sha256_json
from sftmix.disk.regular import refuse_link, regular
from sftmix.disk.texts import read_text
from sftmix.words.errors import DifferenceError, NoSpaceError

MANIFEST = "MANIFEST.json"
TABLE = "compare.yaml"
"""The file that the directory of a table has and no run."""
STARTED = "started.json"
"""The file of a run directory that says from where the run was started."""

NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""How a file system answers what it does not have, as locks or the sync of a directory."""


def hashed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON-able object with a hash of itself, which `read_object` compares."""
    return {**value, "sha256": sha256_json(value)}


@contextmanager
def placing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; its file replaces `path`, whole, when the block ends. NoSpaceError on a full disk."""
    with naming_full_disk(path):
        refuse_link(path.parent).mkdir(parents=True, exist_ok=True)
        # beside it, as os.replace fails between two file systems
        staging = path.with_name(f".tmp-{path.name}.{os.getpid()}")
        staging.unlink(missing_ok=True)  # a stranger's link would be written through
        try:
            yield staging
            sync_path(staging)  # or a power cut may leave the new name without the content
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically."""
    with placing(path) as staging:
        staging.write_bytes(text.encode())  # Path.write_text would end lines in CRLF on Windows


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def is_full(error: BaseException) -> bool:
    """Return True if an error says that the disk, or the quota, is full.

    safetensors and torch.distributed.checkpoint say so in their messages alone.
    """
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


@contextmanager
def naming_full_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raise NoSpaceError, which names the path and the bytes needed, in place of an error of a full disk."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise no_space(path, needed) from error
        raise


def _folder(path: Path) -> Path:
    """Return the directory that holds `path`, or will hold it; a file may be a link to another file system."""
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def no_space(path: Path, needed: int | None = None, problem: str = "no space left to write") -> NoSpaceError:
    """Return the error of a full disk, with the free bytes and those needed, if they are known."""
    need = "" if needed is None else f"{needed:,} bytes are needed, "
    free = f"{need}{shutil.disk_usage(_folder(path)).free:,} are free"
    # f_files 0: it does not count its files, as /proc
    if sys.platform != "win32" and (system := os.statvfs(_folder(path))).f_files and not system.f_favail:
        free = "the file system holds as many files as it can (inodes), whatever its free bytes"
    return NoSpaceError(f"{problem} {path}: {free}; free some and run again")


def check_room(path: Path, needed: int) -> None:
    """Raise NoSpaceError if fewer than `needed` bytes are free for what is to be saved in `path`."""
    if shutil.disk_usage(_folder(path)).free < needed:
        raise no_space(path, needed, "too little room for what is to be saved in")


def remove_leftovers(directory: Path, name: str = "") -> None:
    """Remove what killed processes left of a file in a directory, or below it of any; only for its holder."""
    refuse_link(directory)
    # .tmp-step-00000010.4711: name and process
    mine = directory.glob(f".tmp-{glob.escape(name)}.*") if name else directory.rglob(".tmp-*")
    for leftover in list(mine):
        if leftover.is_dir() and not leftover.is_symlink():  # rmtree leaves a link
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def read_json(path: Path, **needs: type) -> dict[str, Any]:
    """Return the object in a JSON file of a run directory, which may be damaged, or from anyone.

    needs  names that the object must have, with the types of their values
    Raises DifferenceError for a file that is missing, or not as a run writes it.
    """
    try:
        return read_object(read_text(path), path, **needs)
    except (OSError, ValueError) as error:
        raise not_as_written(path, error) from error


def read_object(text: str | bytes, place: object, /, **needs: type) -> dict[str, Any]:
    """Parse a JSON object, with the checks and errors of `read_json`; it has lost the hash that it was `hashed` with.

    place  of the text for the error: its file, and the line if it is one of many
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        if missing := [name for name, kind in needs.items() if not isinstance(value.get(name), kind)]:
            raise ValueError(f"{missing[0]} is missing, or of another kind")
        if value.pop("sha256", None) not in (None, sha256_json(value)):
            raise ValueError("it does not have the hash it was written with")
    except (ValueError, RecursionError) as error:  # json.loads raises the latter for lists in lists
        raise not_as_written(place, error) from error
    return value


_OF_VALUES = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)


@contextmanager
def naming_damage(place: object) -> Iterator[None]:
    """Name a run, or a file of it, where what it holds has another form than a run writes."""
    try:
        yield
    except Exception as error:
        # By its name: the error of a template that finds a list in the place of a mapping.
        if not isinstance(error, _OF_VALUES) and type(error).__name__ != "UndefinedError":
            raise
        raise not_as_written(place, error) from error


def not_as_written(place: object, error: Exception) -> DifferenceError:
    """Return the error of a file of a run directory, or of a line of one, that is not as a run writes it."""
    return DifferenceError(
        f"{place} is not as a run writes it ({type(error).__name__}: {error}); bring it back, or use another directory"
    )


def fresh_directory(final: Path) -> Path:
    """Make an empty staging directory beside `final`, without leftovers of earlier attempts."""
    refuse_link(final.parent).mkdir(parents=True, exist_ok=True)
    remove_leftovers(final.parent, final.name)
    staging = final.parent / f".tmp-{final.name}.{os.getpid()}"
    staging.mkdir()
    return staging


def let_others_read(path: Path) -> None:
    """Give a file the rights of its directory, if there are any; safetensors 0.8 lets its owner alone read one."""
    with suppress(OSError):
        path.chmod(path.parent.stat().st_mode & 0o666)


def file_entry(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a file, once it is on disk."""
    sync_path(path)
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def write_manifest(
    directory: Path, outputs: Sequence[str], *, about: Mapping[str, object] = {}, known: Mapping[str, Any] = {}
) -> None:
    """Write size and hash of some files of a directory, once these are on disk, or of all files in a folder of it.

    The manifest also holds a hash of itself: a bit of a step's number may flip as well as one of a weight.

    known  the entries of files by name that need not be read for it; of files elsewhere, as `../../metrics.jsonl`, too
    """

    def entry(path: Path) -> tuple[str, dict[str, Any]]:
        name = path.relative_to(directory).as_posix()
        return name, known.get(name) or file_entry(path)

    # model -> model/config.json, ...; split.parquet, which has nothing below, -> itself
    files = list[Path]()
    for output in (directory / name for name in outputs):
        files += [file for file in sorted(output.rglob("*")) if file.is_file()] or [output]
    with ThreadPoolExecutor() as threads:  # hashing and fsync let other threads run
        entries = dict(threads.map(entry, files))
    write_json(directory / MANIFEST, hashed({**about, "files": {**known, **entries}}))


def commit_directory(staging: Path, final: Path, *, about: Mapping[str, object], known: Mapping[str, Any] = {}) -> None:
    """Write the manifest last, sync, and rename `staging` to `final` (it replaces an invalid `final`).

    about, known  as of `write_manifest`
    """
    write_manifest(staging, [""], about=about, known=known)
    sync_path(staging)
    if final.exists():  # os.rename replaces no directory that has files
        shutil.rmtree(final)
    os.rename(staging, final)
    sync_path(final.parent)


def verify_directory(
    path: Path,
    *,
    hashes: bool = True,
    without: str | None = None,
    within: Path | None = None,
    part: tuple[int, int] = (0, 1),
) -> str | None:
    """Return None if the manifest is there and every file has its size and its hash, else the problem.

    A file of tensors that the manifest does not list is also a problem, hidden or not: torch's reader takes every
    *.safetensors in the directory. Other files, as editors and file systems leave them, do no harm. A log elsewhere
    may have grown since, or grow now.

    hashes   False: look at the sizes alone, which reads no file
    without  a folder that is left out
    within   a directory above, in which all files are; None: they are in `path`
    part     k, n: the files of the k-th of n who share the work, about as many bytes each
    Raises ConfigError for a link in a run.
    """
    try:
        with naming_damage(path / MANIFEST):  # its entries may be anything
            manifest = read_json(path / MANIFEST, files=dict, sha256=str)
            if strange := sorted({file.name for file in path.glob("*.safetensors")} - manifest["files"].keys()):
                return f"{strange[0]} is not a file of it"

            names = [name for name in manifest["files"] if name.partition("/")[0] != without]
            dealt = sorted(names, key=lambda name: (-manifest["files"][name]["bytes"], name)) if part[1] > 1 else names

            def problem(name: str) -> str | None:
                if not Path(os.path.abspath(path / name)).is_relative_to(os.path.abspath(within or path)):
                    return f"{name} is elsewhere"
                return _problem(path / name, name, manifest["files"][name], hashes)

            with ThreadPoolExecutor() as threads:
                return next(filter(None, threads.map(problem, dealt[part[0] :: part[1]])), None)
    except DifferenceError as error:
        return f"its manifest is unreadable ({error})"


def _problem(file: Path, name: str, entry: Mapping[str, Any], hashes: bool) -> str | None:
    """Return what is wrong with a file by its entry in a manifest; None if nothing is."""
    if not refuse_link(file).is_file():
        return f"{name} is missing"
    # ../../metrics.jsonl has grown: its first bytes must be the ones of then
    log, size = name.startswith("../") and name.endswith(".jsonl"), file.stat().st_size
    whole = size >= entry["bytes"] if log else size == entry["bytes"]
    try:
        same = whole and (not hashes or sha256_file(file, entry["bytes"] if log else None) == entry["sha256"])
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if same else f"{name} does not have the hash it was written with"


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    if sys.platform == "win32":  # it syncs no directory, and no file that is open for reading alone
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:  # of a file system that syncs no directory (some of networks, FUSE)
            raise
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ files of a stage


CHECKPOINTS = "checkpoints"
"""Folder of a stage: the checkpoints to resume from."""
BEST = "best"
"""Folder of a stage: the weights of its best held-out evaluation (checkpoint.keep_best)."""


def step_path(directory: Path, step: int) -> Path:
    """Return the directory of one checkpoint."""
    return directory / f"step-{step:08d}"


def steps_in(directory: Path) -> list[int]:
    """Return the steps that have a checkpoint directory, newest first, valid or not."""
    paths = directory.glob(f"step-{'[0-9]' * 8}")
    return sorted((int(path.name.removeprefix("step-")) for path in paths if path.is_dir()), reverse=True)


def read_steps(stage: Path) -> list[dict[str, Any]]:
    """Return the lines of a stage's metrics.jsonl; none without the file.

    The last line may be torn, by a killed process or because it is being written: it is left out. Raises
    DifferenceError for another line that is not as a run writes it.
    """
    path = stage / "metrics.jsonl"
    if not path.is_file():
        return []
    with regular(path).open("rb") as file:
        lines = [
            read_object(line, f"{path}, line {number}", step=int)
            for number, line in enumerate(file, 1)
            if line.endswith((b"}", b"\n"))  # `{"step": 3, "lo` is torn, `{"step": 3}` lacks its newline alone
        ]
    if len({line["step"] for line in lines}) < len(lines):
        raise not_as_written(path, ValueError("a step is there twice"))
    return lines
