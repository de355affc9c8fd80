"""Files of runs as tools read them: configurations, from anyone and anywhere, and whether a run is what it wrote."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftmix.components.component import Component
from sftmix.config import RunConfig
from sftmix.config.merge import ARGS, CLASS, build, merge
from sftmix.config.read import read_yaml
from sftmix.config.schema import ForeignClassError, component_bases, trusting
from sftmix.disk.files import STARTED, TABLE, read_json
from sftmix.disk.places import Origin, is_there, started
from sftmix.disk.regular import keep_within
from sftmix.pipeline.signature import is_own, names_given
from sftmix.pipeline.stages import by_name
from sftmix.pipeline.start import made_from
from sftmix.pipeline.validity import is_finished
from sftmix.words.errors import ConfigError
from sftmix.words.given import as_list


def is_run(place: str | Path) -> bool:
    """Return True for a run directory, finished or not."""
    return is_there(Path(place).expanduser() / "config.yaml")


def refuse_no_run(place: Path) -> None:
    """Raise ConfigError for a directory of no run, such as a table's."""
    keep_within(place)
    if not is_run(place):
        table = is_there(place / TABLE)
        what = f"is a table: name a run of it, {place}/VARIANT/seed-N" if table else "has no config.yaml"
        raise ConfigError(f"{place} is not a run directory (it {what})")


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Return what `read_json` does; {} without the file."""
    return read_json(path) if is_there(path) else {}


def stages_in(run: Path) -> list[str]:
    """Return the names of stages: those of every run, in their order, and others behind what began before them."""
    began = {file.parent.name: file.stat().st_mtime_ns for file in run.glob("*/inputs.json")}
    names = list(by_name())
    for other in sorted(began.keys() - set(names), key=lambda name: (began[name], name)):
        before = [place for place, name in enumerate(names) if began.get(name, math.inf) <= began[other]]
        names.insert(max(before, default=-1) + 1, other)
    return names


def check_finished(run: Path) -> None:
    """Raise DifferenceError if an output of any finished stage was changed, the exported models left out.

    Raises ConfigError for a link in the run.
    """
    keep_within(run)
    for stage in run.iterdir():  # files as well: they have no manifest
        is_finished(stage, weights=False)


@dataclass(kw_only=True)
class Reading:
    """Options of a command that reads runs, in `reading`."""

    trust: bool = False
    """treat the run as your own: import its classes, open what its config.yaml names"""
    data__train: list[str] = field(default_factory=list)
    """FILE: the rows of the run, in the place of those that it names"""
    data__eval: list[str] = field(default_factory=list)
    """FILE: its held-out rows, likewise"""
    model__path: str | None = None
    """MODEL: its base model, likewise"""


_given: ContextVar[Mapping[str, Any]] = ContextVar("given", default={})  # noqa: B039  # nothing is added to it
"""Option of a run -> what the command line names in its place."""


@contextmanager
def reading(options: Any) -> Iterator[None]:
    """Read runs as the options of a command say, if it has those of `Reading`.

    Raises ConfigError for these options if the command reads no run.
    """
    keys = ("data.train", "data.eval", "model.path", "trust")
    named = {key: getattr(options, key.replace(".", "__"), None) for key in keys}
    given = {key: name for key, name in named.items() if name} if isinstance(options, Reading) else {}
    if given:
        _refuse_no_run_among(options, given)
    before = _given.set({key: name for key, name in given.items() if key != "trust"})
    try:
        with trusting(None) if getattr(options, "trust", False) else nullcontext():
            yield
    finally:
        _given.reset(before)


def _refuse_no_run_among(options: Any, given: Iterable[str]) -> None:
    """Raise ConfigError for options of runs, if a command that reads other places as well got none that is a run."""
    places = as_list(getattr(options, "rows", None) or getattr(options, "place", None) or [])
    others = [getattr(options, "beside", None), *(getattr(options, "models", None) or "").split(",")]
    if places and not any(is_run(name.strip()) for name in [*places, *others] if name):
        remedy = "--model names one that scores these rows" if hasattr(options, "model") else "a model is named itself"
        raise ConfigError(
            f"{', '.join(f'--{key}' for key in given)}: for a run, and {', '.join(places)} is none; leave it out "
            f"({remedy})"
        )


def read_finished(run: Path) -> RunConfig:
    """Read the config.yaml of a run for what only reads the run; ConfigError for unknown keys and shipped classes.

    Components that are not of sftmix are not imported, as the author of the run may be anyone: others of their plain
    forms, which do nothing, take their places. The names of files and models in it hold in `as_started`.
    """
    values, unread = read_yaml(run / "config.yaml"), dict[str, Any]()
    with trusting():  # nobody: a class that is not of sftmix is a ForeignClassError
        for key, base in component_bases().items():
            try:
                merge({}, {key: values[key]} if key in values else {})
            except ForeignClassError:
                unread[key] = _unread(base, values.pop(key))
        config = _built(run, values)
    for key, component in unread.items():
        setattr(config, key, component)
    return config


def read_whole(run: Path) -> RunConfig:
    """Read the config.yaml of a run for what makes its steps: ForeignClassError for a class that is not of sftmix."""
    with trusting():
        return _built(run, read_yaml(run / "config.yaml"))


def _built(run: Path, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a run with what the command line names; a stranger's run has no cache of its own."""
    tree = merge({}, values, of=str(run / "config.yaml"))
    if is_own(run):
        return build(merge(tree, _given.get()))
    strangers = copy_context()
    strangers.run(started.set, started.get()._replace(within=run.resolve()))  # a constructor may look for files
    return strangers.run(build, merge(tree, {**_given.get(), "data.cache_dir": None}))


@contextmanager
def as_started(run: Path | None) -> Iterator[None]:
    """Let the names in a run's configuration mean what they meant when it was started, wherever this process is.

    A relative path begins in the directory of then: where it is now as seen from the run, which may have been moved
    with its data, or else where it was. The id of the model on the hub means the commit that was recorded.

    In a run that is not the user's own they mean no place outside its directory, and no hub id: `place_of` raises
    OutsideError.

    run  None: names mean what they mean here
    """
    origin = Origin()
    if run is not None:
        then = read_json(run / STARTED, directory=str, relative=str)
        # {"directory": "/data/me", "relative": "../.."} of /data/me/runs/first.
        starts = [Path(os.path.normpath(run.resolve() / then["relative"])), Path(then["directory"])]
        within = None if is_own(run) else run.resolve()
        origin = Origin(starts, str(made_from(run)["model"]), names_given(_given.get().values()), within)
    before = started.set(origin)
    try:
        yield
    finally:
        started.reset(before)


def _unread(base: type[Component], form: Any) -> Any:
    """Return a component of this plain form, or name, whose methods raise ConfigError; its needs are the base class's.

    Of a list, a list. It is no subclass of `base`, which would be found by its name.
    """
    if isinstance(form, list):
        return [_unread(base, one) for one in form]
    # `renderer: own.Plain`, or `{class_path: own.Plain, init_args: {}}`.
    plain_form = dict(form) if isinstance(form, Mapping) else {CLASS: form, ARGS: {}}
    path = str(plain_form.get(CLASS))  # own.Plain

    def of_base(_: Component, key: str) -> Any:
        if callable(value := getattr(base, key)):
            raise ConfigError(
                f"{path} is no component of this package, and what only reads a run does not import it; add "
                "--trust if you know it"
            )
        return value

    # Named after the class, as pages and cards show it: type("Plain", ...)().
    return type(path.rpartition(".")[2], (Component,), {"spec": lambda _: plain_form, "__getattr__": of_base})()
