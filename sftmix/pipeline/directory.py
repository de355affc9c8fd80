"""The run directory: stages that are valid for their inputs, or refused.

A stage directory holds `inputs.json` (what it is made from, written when it starts) and, once it is done, MANIFEST.json
with the hashes of its outputs. A rerun reuses a finished stage whose inputs are the same, continues an unfinished one,
and refuses both when the inputs differ: nothing is ever recomputed over other work. Where several runs stand side by
side, a stage that a sibling has finished from the same inputs is adopted instead of being made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sftmix.common.errors import ConfigError, DifferenceError
from sftmix.common.files import MANIFEST, placing, read_json, remove_leftovers, sha256_file, write_json
from sftmix.pipeline.hold import Hold
from sftmix.pipeline.shared import check_same_directory

if TYPE_CHECKING:
    from sftmix.common.world import World

ADOPTED = "adopted.json"
"""In a stage that was made by another run: where that is, relative to the stage directory."""


class RunDirectory:
    """`with RunDirectory(path, world) as run:` holds the lock and keeps STATUS.json up to date (rank 0 writes).

    pool  sibling run directories whose finished stages are adopted where their inputs are the same
    """

    def __init__(self, path: str | os.PathLike[str], world: World, *, pool: Sequence[Path] = ()) -> None:
        self.path = Path(path)
        self.world = world
        self.pool = [Path(sibling) for sibling in pool]
        self._hold = Hold(path)

    def __enter__(self) -> RunDirectory:
        self.world.on_main(self._enter)
        try:
            check_same_directory(self.path, self.world)
        except BaseException as error:
            if self.world.is_main:
                self._hold.release(error)
            raise
        return self

    def _enter(self) -> None:
        self._hold.take()
        for name in ("STATUS.json", "config.yaml", "summary.json", "nonce"):
            remove_leftovers(self.path, name)
        self.status()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.world.is_main:
            return
        if error is None:
            self._hold.done()
        self._hold.release(error)

    def status(self, *, throttle: float = 0.0, **fields: Any) -> None:
        """Update STATUS.json; with `throttle`, at most once in so many seconds."""
        if self.world.is_main:
            self._hold.status(throttle=throttle, **fields)

    def tell(self, **fields: Any) -> None:
        """Update STATUS.json from every rank: a full disk ends them all."""
        self.world.on_main(lambda: self.status(**fields))

    def starts_work(self) -> None:
        """Note that something is about to be made here: STATUS.json of an earlier command no longer holds."""
        if self.world.is_main:
            self._hold.begin()

    def begin(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Enter a stage made from `inputs`; True if it is already done and valid, here or in the pool.

        Raises ConfigError naming what differs where the stage was made, or begun, from other inputs, and
        DifferenceError where an output was changed since.
        """
        return self.is_done(stage, inputs) or self.world.share(self.world.on_main(lambda: self._begin(stage, inputs)))

    def _begin(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        self.starts_work()
        remove_leftovers(self.path / stage)
        write_json(self.path / stage / "inputs.json", inputs)
        self.status(stage=stage, step=0, total_steps=0, doing="")
        return self._adopt(stage, inputs)

    def is_done(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Return True if a stage is done and valid here; raise the errors of `begin`, and write nothing."""
        directory = self.path / stage

        def check() -> bool:
            if problem := other_inputs(directory, inputs):
                raise ConfigError(f"{directory}: {problem}")
            return is_finished(directory)

        return self.world.share(self.world.on_main(check))

    def has(self, stage: str) -> bool:
        """Return True if a stage was finished here, by this command or an earlier one."""
        return self.world.share((self.path / stage / "figures.json").exists() if self.world.is_main else None)

    def identity(self, stage: str) -> str:
        """Return the hash of the inputs of a stage that has begun."""
        return self.world.share(sha256_file(self.path / stage / "inputs.json") if self.world.is_main else None)

    def _adopt(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Take over the stage from the first run of the pool that finished it from the same inputs.

        Its outputs are hard links where the file system has them: nothing here rewrites a file in place. The manifest
        comes last, so that an adoption which was interrupted is done again.
        """
        directory = self.path / stage
        for sibling in self.pool:
            source = sibling / stage
            finished = source != directory and (source / MANIFEST).exists()
            if finished and not differences(read_json(source / "inputs.json"), inputs) and not _changed(source):
                for name in read_json(source / MANIFEST, files=dict)["files"]:
                    _link(source / name, directory / name)
                write_json(directory / ADOPTED, {"from": os.path.relpath(source, directory)})
                _link(source / MANIFEST, directory / MANIFEST)
                return True
        return False

    def finish(self, stage: str, outputs: list[str], figures: Mapping[str, Any]) -> None:
        """Mark a stage as done: figures.json, and the manifest with the hashes of `outputs`, last."""
        directory = self.path / stage

        def record() -> None:
            write_json(directory / "figures.json", figures)
            files = [f for name in [*outputs, "figures.json"] for f in _files(directory / name)]
            hashes = {os.path.relpath(f, directory): sha256_file(f) for f in files}
            write_json(directory / MANIFEST, {"files": hashes})

        self.world.on_main(record)


def is_finished(stage: Path, *, weights: bool = True) -> bool:
    """Return True if a stage is finished; raise DifferenceError if an output of it is not what its manifest says.

    weights  False: leave out its exported model, for those who read its figures alone
    """
    if not (stage / MANIFEST).exists():
        return False
    if changed := _changed(stage, weights=weights):
        raise DifferenceError(f"{stage}: {changed} is not the file this stage wrote; restore it, or move {stage} away")
    return True


def check_finished(run: Path) -> None:
    """Raise DifferenceError if an output of any finished stage was changed, the exported models left out."""
    for stage in run.iterdir():
        is_finished(stage, weights=False)


def other_inputs(directory: Path, inputs: Mapping[str, Any]) -> str | None:
    """Return what refuses `inputs` for a stage that was made, or begun, from others; None if nothing does."""
    if not (directory / "inputs.json").exists() or _untouched(directory):
        return None
    different = differences_in_words(read_json(directory / "inputs.json"), inputs)
    if not different:
        return None
    return f"was made with other inputs: {'; '.join(different[:8])}. Use another --out, or the old settings"


CONTENTS = {
    "model": "the model's files are others (model.path)",
    "data": "the training rows are others (data.train)",
    "data.fingerprint": "the training rows are others, as the model sees them (data.train, selector, template)",
    "eval": "the held-out rows are others, as the model sees them (data.eval, data.eval_fraction)",
}
"""Inputs that are hashes, in words that name the options behind them."""


def differences_in_words(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the differences of two inputs of a stage."""
    return [CONTENTS.get(line.partition(": ")[0], line) for line in differences(old, new)]


def _untouched(directory: Path) -> bool:
    """Return True if a stage directory holds no work yet, so that other inputs may replace those of a first attempt.

    The reference's dynamics lie in the directory of the confidence.
    """
    work = [path for path in directory.iterdir() if path.name not in ("inputs.json", "dynamics.parquet")]
    return all(path.is_file() and not path.stat().st_size for path in work)


def origin(directory: Path) -> Path:
    """Return the directory that a stage was adopted from, or the stage's own if it was made here.

    Raises DifferenceError for one that was adopted from itself, by way of others or not.
    """
    seen = [directory]
    while (file := seen[-1] / ADOPTED).exists():
        source = Path(os.path.normpath(seen[-1] / read_json(file, **{"from": str})["from"]))
        if source in seen:
            raise DifferenceError(f"{file}: it leads back to itself")
        seen.append(source)
    return seen[-1]


def _changed(directory: Path, *, weights: bool = True) -> str | None:
    """Return the first output of a finished stage that is missing or was changed; None if there is none."""
    for name, expected in read_json(directory / MANIFEST, files=dict)["files"].items():
        file = directory / name
        if not weights and name.startswith("model/"):
            continue
        if not file.is_file() or sha256_file(file) != expected:
            return str(name)
    return None


def _link(source: Path, target: Path) -> None:
    """Link a file to `target` in one step, or copy it where the file system has no links."""
    with placing(target) as staging:
        try:
            os.link(source, staging)
        except OSError:  # another file system, or one without links
            shutil.copy2(source, staging)


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


UNKNOWN: Any = object()
"""An input that is not known yet, and so differs from no other."""


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """List the differences of two JSON-able values as `key: old -> new`; `new` may hold UNKNOWN."""
    if new is UNKNOWN:
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if old.get("class_path") != new.get("class_path"):  # another class: its options say nothing about the old one
            return [f"{key}: {old.get('class_path')} -> {new.get('class_path')}"]
        changes = []
        for name in dict.fromkeys([*old, *new]):
            inner = key if name == "init_args" else f"{key}.{name}" if key else str(name)  # as the command line has it
            changes += differences(old.get(name), new.get(name), inner)
        return changes
    if isinstance(old, list) and isinstance(new, (list, tuple)) and len(old) == len(new):
        if any(isinstance(value, Mapping) for value in new):  # components
            return [change for pair in zip(old, new, strict=True) for change in differences(*pair, key)]
        new = list(new)
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]
