"""The rows of a finished run."""

import os
from pathlib import Path

from sftmix.config import RunConfig
from sftmix.disk.places import is_outside, place_of
from sftmix.pipeline.rows import RunRows, read_rows
from sftmix.pipeline.start import made_from
from sftmix.ranks.world import World
from sftmix.tools.runs.read import as_started, read_finished
from sftmix.words.errors import ConfigError


def rows_of_run(path: Path) -> tuple[RunConfig, RunRows]:
    """Return the configuration of a run that has selected its rows, and these, read from their files or the cache.

    Raises ConfigError if the rows are no longer those that a stage of the run was made from, or its model is gone.
    """
    inputs = made_from(path)
    with as_started(path):
        config = read_finished(path)
        if (then := inputs["model"]) and not is_outside(config.model.path):  # of a stranger's run it is not looked for
            refuse_gone(path, config.model.path, then)
        config, rows = read_rows(config, World(), run=path)
    if inputs["model"]:
        # A run that has only its reference recorded no `eval`.
        then = inputs["data"].get("fingerprint"), inputs.get("eval", rows.eval_fingerprint)
        if then != (rows.data.train.fingerprint, rows.eval_fingerprint):
            raise ConfigError(
                f"{path} was made from other rows (data.train, data.eval): the files, the tokenizer, the template, or "
                "the version of sftmix has changed; bring it back to what it was"
            )
    return config, rows


def refuse_gone(run: Path, path: str, then: str) -> None:
    """Raise ConfigError if the base model of a run was a directory, and is not there.

    then  a hash of files, as 3c156600..., or name and commit of the hub, as gpt2@607a30d7...
    """
    if not (os.path.isdir(place_of(path)) or "@" in then):  # else a hub may have something of that name
        raise another_model(run, path)


def another_model(run: Path, path: str) -> ConfigError:
    """Return the error for a base model that is not the recorded one."""
    return ConfigError(
        f"model.path: {path} ({place_of(path).absolute()}) is not the model that {run} was made from: its files are "
        "others, or gone. Bring them back; or if that model is elsewhere now, name its place: --model.path PLACE"
    )
