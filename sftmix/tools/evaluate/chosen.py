"""Names of tasks -> what lm-eval loads: the task files of this room on local rows, or lm-eval's own and a user's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, DataError
from sftmix.common.files import sha256_file
from sftmix.tools.evaluate.convert import BENCHMARKS, files_of

OWN = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class ChosenTask:
    """A task to measure.

    spec    what lm-eval's TaskManager loads: the name, or the whole configuration of a task of this room
    source  what else the result depends on, by name: hashes of the task file and of its rows
    """

    name: str
    spec: str | Mapping[str, Any]
    source: Mapping[str, str]


def chosen_tasks(names: Sequence[str], data_dir: Path | None, include: Path | None) -> list[ChosenTask]:
    """Find tasks by name; raise ConfigError for rows that are not there.

    data_dir  the directory with the converted rows of this room's tasks
    include   directory of a user's task files; the hashes of all files there are part of each other task's source
    Names that are neither are those of lm-eval, which `manager` checks.
    """
    if not names:
        raise ConfigError("--tasks names no task; give some, as --tasks medqa_4options,pubmedqa")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--tasks names {', '.join(twice)} more than once; name each task once")
    if include is not None and not include.is_dir():
        raise ConfigError(f"--include_path {include} is not a directory; name one with task files (*.yaml)")
    theirs = {} if include is None else {"include_path": _hash_of(include)}
    return [_own(name, data_dir) if name in BENCHMARKS else ChosenTask(name, name, theirs) for name in names]


def _own(name: str, data_dir: Path | None) -> ChosenTask:
    import yaml

    make = f"sftmix evaluate RAW --convert {name} --to DIR"
    if data_dir is None:
        raise ConfigError(f"task {name} is measured on local rows: give --data_dir DIR; `{make}` makes them")
    rows, shots = files_of(name, data_dir)
    for file in (rows, shots):
        if not file.exists():
            raise ConfigError(f"--data_dir {data_dir} has no {file.name}, which task {name} needs; `{make}` makes it")
    own = yaml.safe_load((OWN / f"{name}.yaml").read_text(encoding="utf-8"))
    shared = OWN / own.pop("include")
    spec = yaml.safe_load(shared.read_text(encoding="utf-8")) | own
    spec["dataset_kwargs"] = {"data_files": {"test": str(rows), "shots": str(shots)}}
    files = {"task": OWN / f"{name}.yaml", "shared": shared, "rows": rows, "shots": shots}
    return ChosenTask(name, spec, {key: sha256_file(file) for key, file in files.items()})


def _hash_of(directory: Path) -> str:
    """Return the hash of all files of a directory with their names: a task file may read rows and code beside it."""
    digest = hashlib.sha256()
    for file in sorted(p for p in directory.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{file.relative_to(directory)} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def manager(tasks: Sequence[ChosenTask], include: Path | None) -> Any:
    """Return lm-eval's TaskManager for these tasks; raise ConfigError for names that it does not know.

    Its own task files, thousands, are read only where one of the names may be among them. Rows that cannot be fetched
    where a task is loaded are a DataError.
    """
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            except OSError as error:  # as all are that tell of the network, the hub or a missing file
                raise _not_loaded(task_list, error) from error

    others = [task.name for task in tasks if isinstance(task.spec, str)]
    include_path = None if include is None else str(include)
    found = Manager(include_path=include_path, include_defaults=False)
    if set(others) - set(found.all_tasks):
        found = Manager(include_path=include_path)
    unknown = sorted(set(others) - set(found.all_tasks))
    if unknown:
        raise ConfigError(
            f"no task {', '.join(unknown)}; there are {', '.join(BENCHMARKS)} of this package, those of lm-eval "
            "(`lm_eval ls tasks` lists them) and the files of --include_path"
        )
    return found


def _not_loaded(specs: Sequence[str | Mapping[str, Any]], error: Exception) -> DataError:
    names = ", ".join(spec if isinstance(spec, str) else str(spec["task"]) for spec in specs)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return DataError(
        f"--tasks: {names}: lm-eval cannot load the task or its rows: {reason}. Without a network it finds the rows "
        "that it fetched before; or measure local rows, by a task file of your own (--include_path) or a task of this "
        "package (--data_dir)."
    )
