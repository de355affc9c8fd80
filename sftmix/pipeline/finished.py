"""The models that a run has made, and models from elsewhere: found, or refused.

What is refused is refused before torch is imported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sftmix.common.errors import ConfigError
from sftmix.common.files import is_there
from sftmix.config.read import read_finished
from sftmix.model.paths import model_at_hand, model_place, named
from sftmix.pipeline.directory import is_finished

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtypes in which the weights of a finished model are loaded or exported; auto: as they are stored."""
TARGET = "target"
OF_A_RUN = (TARGET, "baseline", "base")
"""The models that a run can have."""


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


def finished_models(place: str | Path, names: Sequence[str] = (TARGET,)) -> list[FinishedModel]:
    """Find models by their names, in the order of the names. That of an adopted stage lies in the run, too.

    place   a run directory, or a model directory or hub id, of which there is one model alone: its target
    names   of a run target, baseline and base; and any other place, of which the target is taken
    Raises ConfigError for a model that is not there; DifferenceError for a model of a run whose files, or those beside
    it in its stage, were changed since.
    """
    models = []
    for name in map(str.strip, names):
        of, wanted = (str(place), name) if name in OF_A_RUN else (name, TARGET)
        run = Path(of).expanduser()
        if not is_run(run):
            if wanted != TARGET:
                raise ConfigError(f"{of} is a model and not a run directory, so it has no {wanted}; name a run")
            with named(f"model {of}"):
                path, local = model_at_hand(of)
            if local and not any((Path(path) / file).exists() for file in ("config.json", "adapter_config.json")):
                raise ConfigError(
                    f"{of} is neither a run directory (it has no config.yaml) nor a model (it has no config.json); of "
                    "a table of `sftmix compare` name the directory of one variant and seed"
                )
            models.append(FinishedModel(of, path, None))
        elif wanted == "base":
            models.append(FinishedModel(name, model_place(read_finished(run).model.path)[0], run))
        else:
            stage = run / ("train" if wanted == TARGET else wanted)
            if not is_finished(stage) or not (stage / "model").is_dir():
                more = "" if wanted == TARGET else " --with_baseline true"
                raise ConfigError(
                    f"{run}: {stage.name} is not trained yet (sftmix run --config {run}/config.yaml --out {run}{more})"
                )
            models.append(FinishedModel(name, str(stage / "model"), run))
    return models
