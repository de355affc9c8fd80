"""Models of finished runs, and models from elsewhere, found or refused before torch is imported."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sftmix.common.errors import ConfigError
from sftmix.common.files import refuse_links
from sftmix.common.places import is_there
from sftmix.config.read import TABLE, as_started, read_finished
from sftmix.model.paths import model_at_hand, model_place, named
from sftmix.pipeline.stages import is_finished

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtypes in which the weights of a finished model are loaded or exported; auto: as they are stored."""
OF_A_RUN = ("target", "baseline", "base")
"""The models that a run can have."""


class FinishedModel(NamedTuple):
    """A model that can be loaded.

    name  target, baseline or base of a run; else the directory or hub id as it was given
    path  a hub id, or a directory with weights or adapters
    run   the run directory whose chat template and stop ids count; None: the model's own
    """

    name: str
    path: str
    run: Path | None


def is_run(place: str | Path) -> bool:
    """Return True for a run directory, finished or not."""
    return is_there(Path(place).expanduser() / "config.yaml")


def refuse_no_run(place: Path) -> None:
    """Raise ConfigError for what is no run directory, such as that of a table."""
    if not is_run(place):
        table = is_there(place / TABLE)
        what = f"is a table: name a run of it, {place}/VARIANT/seed-N" if table else "has no config.yaml"
        raise ConfigError(f"{place} is not a run directory (it {what})")


def finished_models(place: str | Path, names: Sequence[str] = ("target",)) -> list[FinishedModel]:
    """Find models by their names, in the order of the names. The model of an adopted stage is in the run as well.

    place   a run directory, or a model directory or hub id, of which there is one model alone: its target
    names   for a run target, baseline and base; and any other place, whose target is taken
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
        refuse_links(run)
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
        models.append(FinishedModel(name, path, run.absolute()))
    return models
