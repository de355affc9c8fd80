"""Models of finished runs, and models from elsewhere, found or refused before torch is imported."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sftmix.cli.say import as_word
from sftmix.disk.regular import keep_within
from sftmix.model.paths import ADAPTERS, model_place, named
from sftmix.pipeline.validity import is_finished
from sftmix.tools.runs.read import as_started, is_run, read_finished
from sftmix.words.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Dtypes in which the weights of a finished model are loaded or exported; auto: as they are stored."""
Turns = Sequence[Mapping[str, Any]]
"""Turns of a conversation, {role: ..., content: ..., ...}."""
Functions = Sequence[Mapping[str, Any]]
"""Functions that an assistant may call, in OpenAI's form."""
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


def finished_models(place: str | Path, names: Sequence[str] = ("target",)) -> list[FinishedModel]:
    """Find models by their names, in the order of the names. The model of an adopted stage is in the run as well.

    place   a run directory, or a model directory or hub id, of which there is one model alone: its target
    names   for a run target, baseline and base; and any other place, whose target is taken
    Raises ConfigError for a model that is not there; DifferenceError for a model of a run whose files, or those beside
    it in its stage, were changed since.
    """
    models = []
    if not (distinct := dict.fromkeys(filter(None, map(str.strip, names)))):  # `--models target,` names one
        raise ConfigError(f"no model is named in {','.join(names)!r}; name target, baseline, base or another place")
    for name in distinct:
        # base -> (runs/first, base); my-model -> (my-model, target).
        of, wanted = (str(place), name) if name in OF_A_RUN else (name, "target")
        run = Path(of).expanduser()
        if not is_run(run):
            if wanted != "target":
                raise ConfigError(f"{of} is a model and not a run directory, so it has no {wanted}; name a run")
            with named(f"model {of}"):
                path, local = model_at_hand(of)
            if local and not any((Path(path) / file).exists() for file in ("config.json", ADAPTERS)):
                raise ConfigError(
                    f"{of} is neither a run directory (it has no config.yaml) nor a model (it has no config.json); of "
                    "a table of `sftmix compare` name the directory of one variant and seed"
                )
            models.append(FinishedModel(of, path, None))
            continue
        keep_within(run)
        stage = run / ("train" if wanted == "target" else wanted)
        path = str(stage.absolute() / "model")  # `as_started` moves relative names
        if wanted == "base":
            with as_started(run):
                path = model_place(read_finished(run).model.path)[0]  # no copy of it is in the run
        elif not is_finished(stage) or not os.path.isdir(path):
            more = " --with_baseline true" * (wanted == "baseline")
            raise ConfigError(
                f"{run}: {stage.name} is not trained yet; this trains it: sftmix run --config "
                f"{as_word(run / 'config.yaml')} --out {as_word(run)}{more}"
            )
        models.append(FinishedModel(name, path, run.absolute()))
    return models


def model_at_hand(path: str | Path) -> tuple[str, bool]:
    """Return `model_place` of a model that can be read now.

    Raises ConfigError if a hub id is neither in the cache nor on a hub that answers.
    """
    name, local = model_place(path)
    if not local:
        from huggingface_hub import HfApi, try_to_load_from_cache

        try:
            if not any(try_to_load_from_cache(name, file) for file in ("config.json", ADAPTERS)):
                HfApi().model_info(name, timeout=10)
        except Exception as error:  # the hub's client also raises errors of other libraries
            raise ConfigError(
                f"model.path: cannot load {path} (no directory here; as a hub id: is it spelt right, is there a "
                f"network?): {str(error).partition(chr(10))[0]}"
            ) from error
    return name, local
