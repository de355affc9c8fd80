"""The models that a run has made, and models from elsewhere: found and refused before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sftmix.common.errors import ConfigError, nearest, told
from sftmix.common.files import MANIFEST
from sftmix.common.names import is_there
from sftmix.config.read import read_finished
from sftmix.model.paths import model_at_hand, model_place, named
from sftmix.pipeline.directory import is_finished

TARGET = "target"


@dataclass(frozen=True)
class FinishedModel:
    """A model that can be loaded.

    name    target, baseline or base of a run; else the directory or hub id as it was given
    path    a hub id, or a directory with weights or adapters
    run     the run directory whose chat template and stop ids count; None: those of the model itself
    option  what chose the path, for messages
    """

    name: str
    path: str
    run: Path | None
    option: str = "model.path"


def finished_models(
    place: str | Path, names: Sequence[str] = (TARGET,), *, option: str = "--models"
) -> list[FinishedModel]:
    """Find models by their names, in the order of the names.

    place   a run directory, or a model directory or hub id, of which there is one model alone: its target
    names   of a run target, baseline and base; and any other place, of which the target is taken
    option  name of the option that holds the names, for messages
    Raises ConfigError for a model that is not there, with what is, for a name given twice, and for no name at all;
    DifferenceError for a model of a run whose files, or those beside it in its stage, were changed since.
    """
    if not names:
        raise ConfigError(f"{option} names no model; of a run there are {', '.join(OF_A_RUN)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"model {', '.join(twice)} is named more than once; name each model once")
    return [_found(str(place), name, option) for name in names]


def is_run(place: str | Path) -> bool:
    """Return True for a run directory, finished or not."""
    return (Path(place).expanduser() / "config.yaml").exists()


def refuse_no_run(place: Path) -> None:
    """Raise ConfigError for what is no run directory."""
    if not is_run(place):
        raise ConfigError(f"{place} is not a run directory (it has no config.yaml)")


def _found(place: str, name: str, option: str) -> FinishedModel:
    if is_run(place) and name in OF_A_RUN:
        run = Path(place).expanduser()
        return FinishedModel(name, OF_A_RUN[name](run), run)
    if not is_run(place) and name in OF_A_RUN and name != TARGET:
        raise ConfigError(f"{place} is a model and not a run directory, so it has no {name}; name a run directory")
    elsewhere, chosen_by = (place, f"model {place}") if name == TARGET else (name, option)
    if is_run(elsewhere):
        run = Path(elsewhere).expanduser()
        return FinishedModel(elsewhere, OF_A_RUN[TARGET](run), run)
    misspelt = is_run(place) and "/" not in name and not is_there(name)
    if misspelt and (guess := nearest(name, OF_A_RUN, cutoff=0.75)):  # gpt2-large is a name of the hub, 0.63 of target
        there = f"of {place} there are {', '.join(_there(Path(place).expanduser()))}"
        raise ConfigError(told(f"{option}: the run has no model {name!r}", guess, there))
    return FinishedModel(elsewhere, _model_directory(elsewhere, chosen_by), None, chosen_by)


def _model_directory(place: str, option: str) -> str:
    with named(option):
        path, local = model_at_hand(place)
    if local and not any((Path(path) / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(
            f"{place} is neither a run directory (it has no config.yaml) nor a model (it has no config.json); of a "
            "table of `sftmix compare` name the directory of one variant and seed"
        )
    return path


# ----------------------------------------------------------------------------------------- models of a run


def _trained(stage: str) -> Callable[[Path], str]:
    def place(run: Path) -> str:
        model = run / stage / "model"  # of an adopted stage, too
        if not is_finished(run / stage) or not model.is_dir():
            again = f"sftmix run --config {run / 'config.yaml'} --out {run}"
            again += "" if stage == "train" else " --with_baseline true"
            raise ConfigError(f"{run}: {stage} is not trained yet ({again}); there are {', '.join(_there(run))}")
        return str(model)

    return place


def _base(run: Path) -> str:
    return model_place(read_finished(run).model.path)[0]


def _best(run: Path) -> str:
    raise ConfigError(
        f"{run}: the best weights are a checkpoint, of a run with --checkpoint.keep_best true and held-out rows; "
        f"sftmix export {run} --best --to DIR makes a model of it, then name DIR"
    )


def _there(run: Path) -> list[str]:
    stages = {TARGET: "train", "baseline": "baseline"}
    return [*(name for name, stage in stages.items() if (run / stage / MANIFEST).exists()), "base"]


OF_A_RUN: dict[str, Callable[[Path], str]] = {
    TARGET: _trained("train"),
    "baseline": _trained("baseline"),
    "base": _base,
    "best": _best,
}
"""The models that a run can have -> what finds the hub id or directory of each."""
