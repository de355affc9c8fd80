"""Start of a run: the stages that it enters, and what is refused before any of them is made. It needs no torch."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sftmix.components.component import require
from sftmix.config import RunConfig
from sftmix.config.wants import Wants
from sftmix.disk.files import STARTED, not_as_written, read_json
from sftmix.disk.places import is_there, place_of, started
from sftmix.disk.regular import keep_within
from sftmix.pipeline.context import StageSpec
from sftmix.pipeline.inputs import config_of_reference
from sftmix.pipeline.signature import is_own
from sftmix.pipeline.stages import STAGES, by_name
from sftmix.words.errors import ConfigError, DifferenceError


def wanted_stages(config: RunConfig, until: str, stages: Sequence[StageSpec] = STAGES) -> list[StageSpec]:
    """Return the stages that a command makes or reads back, in order.

    NTP without pairs needs no split, and a split by label no reference. A single run makes its last split only if the
    training came to its second epoch. Raises ConfigError for a stage that this
    configuration does not have.
    """
    last = [name for name, stage in by_name(stages).items() if stage.result]
    require(until in last, "until", until, ", ".join(last))
    wants = Wants(config, until)
    if wants.single_run and not wants.training:
        raise ConfigError(
            f"--reference {config.reference} takes the losses of the target's own training, so "
            f"there is no {until} before it: use `run`, or another --reference"
        )
    return [stage.among(stages) for stage in stages if stage.wanted(wants)]


def made_from(run: Path) -> dict[str, Any]:
    """Return what a run recorded of its rows and its model, whose hashes are None before it came so far."""
    for stage in (run / "train", run / "reference"):  # a reference may be of an earlier try
        if any(stage.glob("[!.]*")):
            made = read_json(stage / "inputs.json", data=dict, model=str)
            if not made["model"]:  # it would be no hash to compare
                raise not_as_written(stage / "inputs.json", ValueError("model is empty"))
            return made
    return {"data": {}, "model": ""}


@contextmanager
def as_begun(run: Path) -> Iterator[None]:
    """Let the id of the model on the hub mean the commit with which this user began a run: another one is refused."""
    origin = started.get()
    before = started.set(origin._replace(model=str(made_from(run)["model"])) if is_own(run) else origin)
    try:
        yield
    finally:
        started.reset(before)


_KEYS = {"STATUS.json": "stage", STARTED: "directory"}
"""Files that a run writes before any other, each with a name in it."""


def is_ours(file: Path) -> bool:
    """Return True if a file of `_KEYS` is one that a run, or a table, wrote."""
    with suppress(DifferenceError, KeyError):  # KeyError: config.yaml and summary.json name nobody
        return bool(read_json(file, **{_KEYS[file.name]: str}))
    return False


def _refuse_foreign(directory: Path, names: Iterable[str]) -> None:
    """Raise ConfigError for a directory that no run began in and that holds a name a run writes at its top.

    names  of stages
    """
    there = [name for name in names if is_there(directory / name)]
    # None that are hidden: a kill leaves .tmp- files.
    stages = {name: {file.name for file in (directory / name).glob("[!.]*")} for name in there}
    # Inputs and work: stages of another run, as docs/distributed.md has people copy reference/, confidence/ and split/.
    copied = any(inside > {"inputs.json"} for inside in stages.values())
    taken = [] if copied or is_ours(directory / STARTED) else ["config.yaml", "summary.json", *_KEYS, *stages]
    for place in filter(is_there, (directory / name for name in taken)):
        if stages.get(place.name) or not (place.is_dir() or is_ours(place)):  # a kill may leave an empty directory
            raise ConfigError(
                f"out: no run wrote {place}, as {directory} has no {STARTED} of one, and this run would write there; "
                "name another directory, --out runs/NAME"
            )


def check_directory(config: RunConfig, stages: Sequence[StageSpec] = STAGES) -> None:
    """Raise ConfigError for a directory with files that a run would replace, or that the run reads its inputs from."""
    directory = Path(config.out or "")
    keep_within(directory)
    _refuse_foreign(directory, by_name(stages))
    read = [("model.path", config.model.path), ("reference.model.path", config_of_reference(config).model.path)]
    read += [(f"data.{key}", name) for key in ("train", "eval") for name in getattr(config.data, key) or []]
    for key, name in read:
        if is_there(directory) and is_there(place := place_of(name)) and os.path.samefile(place, directory):
            raise ConfigError(f"out: {directory} is {key} as well, whose files a run would add to; name another one")
