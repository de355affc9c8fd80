"""The run directory: one process at a time, STATUS.json, and stages that are valid for their inputs, or refused.

A stage directory holds `inputs.json` (what it is made from, written when it starts) and, once it is done, MANIFEST.json
with the hashes of its outputs. A rerun reuses a finished stage whose inputs are the same, continues an unfinished one,
and refuses both when the inputs differ: nothing is ever recomputed over other work. Where several runs stand side by
side, a stage that a sibling has finished from the same inputs is adopted instead of being made again.

Below: the models that a run has made, and models from elsewhere, found or refused before torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from filelock import FileLock, Timeout

from sftmix.common.errors import INTERRUPTED, ConfigError, DifferenceError, InUseError, NoSpaceError
from sftmix.common.files import (
    MANIFEST,
    is_there,
    path_problem,
    placing,
    read_json,
    remove_leftovers,
    sha256_file,
    write_json,
    write_text,
)
from sftmix.config.read import STARTED, as_started, read_finished
from sftmix.model.paths import model_at_hand, model_place, named

if TYPE_CHECKING:
    from sftmix.common.world import World

Inputs = Mapping[str, Any]
"""What a stage is made from, JSON-able; a value that is not known yet is UNKNOWN."""
ADOPTED = "adopted.json"
"""In a stage that was made by another run: where that is, relative to the stage directory."""
LOOKS = 50
"""How often, five times a second, a node looks for a file that rank 0 has written: it may remember the directory
without it (NFS does so for some seconds)."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtypes in which the weights of a finished model are loaded or exported; auto: as they are stored."""
OF_A_RUN = ("target", "baseline", "base")
"""The models that a run can have."""


class Hold:
    """`with Hold(path) as hold:` keeps other processes out; an error that leaves the block is told in STATUS.json.

    The STATUS.json of a run that has come as far as a stage stays, until a command begins to make a stage or has read
    back an unfinished run to its end.

    Of the processes of a torchrun the first one does all this.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._main = Path(path), os.environ.get("RANK", "0") == "0"
        self._lock = FileLock(self.path / ".lock")
        self._status: dict[str, Any] = {
            "stage": "start",
            "step": 0,
            "total_steps": 0,
            "exit_code": None,
            "started": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        self._earlier: dict[str, Any] = {}
        """The STATUS.json of another process, while it stays."""

    def __enter__(self) -> Self:
        """Take the lock. Raises ConfigError for a path that cannot be a run directory, InUseError if it is taken."""
        if not self._main:
            return self
        if problem := path_problem(self.path):
            raise ConfigError(f"out: {str(self.path)!r} cannot be a run directory: it {problem}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise InUseError(f"another process is using {self.path}; wait for it, or choose another --out") from None
        except OSError as error:
            raise ConfigError(f"out: {self.path} cannot be a run directory: {error.strerror or error}") from error
        for name in ("STATUS.json", "config.yaml", STARTED, "summary.json", "nonce"):
            remove_leftovers(self.path, name)
        with contextlib.suppress(DifferenceError):  # none, or one that cannot be read
            earlier = read_json(self.path / "STATUS.json", stage=str)
            if earlier["stage"] not in ("start", "data"):  # as before a command begins to make its first stage
                self._earlier = earlier
        return self

    def __exit__(self, *raised: Any) -> None:
        """Note the error that ended the command, if any, and give the lock back."""
        if (error := raised[1]) is not None:
            with contextlib.suppress(NoSpaceError):  # it would hide the error that is told of
                code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
                self.status(exit_code=code, message=f"{type(error).__name__}: {error}")
        self._lock.release()

    def status(self, *, throttle: float = 0.0, **fields: Any) -> None:
        """Update STATUS.json; with `throttle`, at most once in so many seconds."""
        self._status |= fields
        now = time.time()
        if self._main and not self._earlier and now - self._status.get("updated", 0.0) >= throttle:
            self._status["updated"] = now
            write_json(self.path / "STATUS.json", self._status)

    def starts_work(self) -> None:
        """Note that something is about to be made here: from now on STATUS.json tells of this process."""
        self._earlier = {}


class RunDirectory(Hold):
    """`with RunDirectory(path, world) as run:` holds the lock and keeps STATUS.json up to date (rank 0 writes).

    A stage is made between `begin`, which says whether there is anything to do, and `finish`. Every rank calls each of
    these; rank 0 reads and writes.

    pool  sibling run directories whose finished stages are adopted where their inputs are the same
    """

    def __init__(self, path: str | os.PathLike[str], world: World, *, pool: Sequence[Path] = ()) -> None:
        super().__init__(path)
        self.world, self.pool, self._main = world, pool, world.is_main

    def __enter__(self) -> Self:
        self.world.on_main(super().__enter__)
        return self

    def __exit__(self, *raised: Any) -> None:
        if raised[1] is None:  # the command did all it should
            if self._earlier.get("exit_code") != 0:
                self.starts_work()
            self.status(exit_code=0, message="")
        super().__exit__(*raised)

    def tell(self, **fields: Any) -> None:
        """Update STATUS.json from every rank: a full disk ends them all."""
        self.world.on_main(lambda: self.status(**fields))

    def begin(self, stage: str, inputs: Inputs, configuration: str = "") -> bool:
        """Enter a stage made from `inputs`; True if it is already done and valid, here or in the pool.

        From the first run of the pool that finished it from the same inputs it is taken over. Its outputs are hard
        links where the file system has them: nothing here rewrites a file in place. Raises ConfigError naming what
        differs where the stage was made, or begun, from other inputs, and DifferenceError where an output was changed.

        configuration  of the run, which config.yaml holds from the first stage on that is not done here
        """
        directory = self.path / stage

        def enter() -> bool:
            refuse_others(directory, inputs)
            if is_finished(directory):
                return True
            self.starts_work()
            remove_leftovers(directory)
            write_json(directory / "inputs.json", inputs)
            write_text(self.path / "config.yaml", configuration)
            here = os.getcwd()
            relative = os.path.relpath(here, self.path.resolve())
            write_json(self.path / STARTED, {"directory": here, "relative": relative})
            self.status(stage=stage, step=0, total_steps=0, doing="")
            for source in (sibling / stage for sibling in self.pool):
                equal = (source / MANIFEST).exists() and not differences(read_json(source / "inputs.json"), inputs)
                if equal and is_finished(source):
                    for name in read_json(source / MANIFEST, files=dict)["files"]:
                        _link(source / name, directory / name)
                    write_json(directory / ADOPTED, {"from": os.path.relpath(origin(source), directory)})
                    _link(source / MANIFEST, directory / MANIFEST)  # last: what was interrupted before is done again
                    return True
            return False

        return self.world.from_main(enter)

    def finish(self, stage: str, outputs: Sequence[str], figures: Mapping[str, Any]) -> None:
        """Mark a stage as done: figures.json, and the manifest with the hashes of `outputs`, last."""
        directory = self.path / stage

        def record() -> None:
            write_json(directory / "figures.json", figures)
            hashes = {}
            for output in (directory / name for name in [*outputs, "figures.json"]):
                for file in [file for file in sorted(output.rglob("*")) if file.is_file()] or [output]:
                    hashes[file.relative_to(directory).as_posix()] = sha256_file(file)
            write_json(directory / MANIFEST, {"files": hashes})

        self.world.on_main(record)


def check_same_directory(path: Path, world: World) -> None:
    """Raise ConfigError on every rank, which names a node that does not see the run directory which rank 0 writes.

    Rank 0 writes a file with a random name, which all others look for. Call it on every rank, in the directory that
    exists; on one process it does nothing.
    """
    if world.size == 1:
        return
    file = path / world.share(f".tmp-nonce.{secrets.token_hex(8)}")  # `remove_leftovers` knows it, if this is killed
    world.on_main(lambda: write_text(file, ""))

    def look() -> None:
        for _ in range(LOOKS):
            if file.exists():
                return
            time.sleep(0.2)
            if path.is_dir():
                os.listdir(path)  # NFS then looks again
        raise ConfigError(
            f"out: {path.absolute()} is not the run directory that rank 0 writes. Choose an --out on a file system "
            "that all nodes share, by its whole path"
        )

    try:
        world.node_first(look)
        world.barrier()
    finally:
        if world.is_main:
            file.unlink(missing_ok=True)


def is_finished(stage: Path, *, weights: bool = True) -> bool:
    """Return True if a stage is finished; raise DifferenceError if an output of it is not what its manifest says.

    weights  False: leave out its exported model, for those who read its figures alone
    """
    if not (stage / MANIFEST).exists():
        return False
    for name, expected in read_json(stage / MANIFEST, files=dict)["files"].items():
        file, counts = stage / name, weights or not name.startswith("model/")
        if counts and not (file.is_file() and sha256_file(file) == expected):
            raise DifferenceError(f"{stage}: {name} is not the file this stage wrote; restore it, or move {stage} away")
    return True


def check_finished(run: Path) -> None:
    """Raise DifferenceError if an output of any finished stage was changed, the exported models left out."""
    for stage in run.iterdir():
        is_finished(stage, weights=False)


def refuse_others(directory: Path, inputs: Inputs) -> None:
    """Raise ConfigError for a stage that was made, or begun, from other inputs.

    Where it holds no work yet, other inputs may replace those of a first attempt. The reference's dynamics lie in the
    directory of the confidence.
    """
    work = [path for path in directory.glob("*") if path.name not in ("inputs.json", "dynamics.parquet")]
    if not (directory / "inputs.json").exists() or all(path.is_file() and not path.stat().st_size for path in work):
        return
    different = differences(read_json(directory / "inputs.json"), inputs)
    if words := "; ".join(CONTENTS.get(line.partition(": ")[0], line) for line in different):
        raise ConfigError(f"{directory}: was made with other inputs: {words}. Use another --out, or the old settings")


CONTENTS = {
    "model": "the model's files are others (model.path)",
    "data": "the training rows are others (data.train)",
    "data.fingerprint": "the training rows are others, as the model sees them (data.train, selector, template)",
    "rounding": "the exported weights are rounded in another way (checkpoint.rounding)",
    "eval": "the held-out rows are others, as the model sees them (data.eval, data.eval_fraction)",
}
"""Inputs that are hashes, in words that name the options behind them."""


def origin(directory: Path) -> Path:
    """Return the directory that a stage was adopted from, or the stage's own if it was made here."""
    if not (directory / ADOPTED).exists():
        return directory
    return Path(os.path.normpath(directory / read_json(directory / ADOPTED, **{"from": str})["from"]))


def _link(source: Path, target: Path) -> None:
    """Link a file to `target` in one step, or copy it where the file system has no links."""
    with placing(target) as staging:
        try:
            os.link(source, staging)
        except OSError:  # another file system, or one without links
            shutil.copy2(source, staging)


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
        return [change for pair in zip(old, new, strict=True) for change in differences(*pair, key)]
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]


# ------------------------------------------------------------------------------------------ models of runs


class FinishedModel(NamedTuple):
    """A model that can be loaded.

    name  target, baseline or base of a run; else the directory or hub id as it was given
    path  a hub id, or a directory with weights or adapters
    run   the run directory whose chat template and stop ids count; None: those of the model itself
    """

    name: str
    path: str
    run: Path | None


def is_run(place: str | Path) -> bool:
    """Return True for a run directory, finished or not."""
    return is_there(Path(place).expanduser() / "config.yaml")


def refuse_no_run(place: Path) -> None:
    """Raise ConfigError for what is no run directory."""
    if not is_run(place):
        raise ConfigError(f"{place} is not a run directory (it has no config.yaml)")


def finished_models(place: str | Path, names: Sequence[str] = ("target",)) -> list[FinishedModel]:
    """Find models by their names, in the order of the names. That of an adopted stage lies in the run, too.

    place   a run directory, or a model directory or hub id, of which there is one model alone: its target
    names   of a run target, baseline and base; and any other place, of which the target is taken
    Raises ConfigError for a model that is not there; DifferenceError for a model of a run whose files, or those beside
    it in its stage, were changed since.
    """
    models = []
    for name in map(str.strip, names):
        of, wanted = (str(place), name) if name in OF_A_RUN else (name, "target")
        run = Path(of).expanduser()
        if not is_run(run):
            if wanted != "target":
                raise ConfigError(f"{of} is a model and not a run directory, so it has no {wanted}; name a run")
            with named(f"model {of}"):
                path, local = model_at_hand(of)
            if local and not any((Path(path) / file).exists() for file in ("config.json", "adapter_config.json")):
                raise ConfigError(
                    f"{of} is neither a run directory (it has no config.yaml) nor a model (it has no config.json); of "
                    "a table of `sftmix compare` name the directory of one variant and seed"
                )
            models.append(FinishedModel(of, path, None))
            continue
        stage = run / ("train" if wanted == "target" else wanted)
        path = str(stage.absolute() / "model")  # `as_started` moves relative names
        if wanted == "base":
            with as_started(run):
                path = model_place(read_finished(run).model.path)[0]
        elif not is_finished(stage) or not os.path.isdir(path):
            raise ConfigError(
                f"{run}: {stage.name} is not trained yet; the baseline needs --with_baseline true "
                f"(sftmix run --config {run}/config.yaml --out {run})"
            )
        models.append(FinishedModel(name, path, run))
    return models
