"""The rows of a finished run."""

from pathlib import Path

from sftmix.config import RunConfig
from sftmix.pipeline.rows import RunRows, read_rows
from sftmix.ranks.world import World
from sftmix.tools.runs.read import as_started, made_from, read_finished
from sftmix.words.errors import ConfigError


def rows_of_run(path: Path, *, progress: bool = False) -> tuple[RunConfig, RunRows]:
    """Return the configuration of a run that has selected its rows, and these, read from their files or the cache.

    Raises ConfigError if the rows are no longer those that a stage of the run was made from.
    """
    with as_started(path):
        config, rows = read_rows(read_finished(path), World(), run=path, progress=progress)
    if (inputs := made_from(path))["model"]:
        # A run that has only its reference recorded no `eval`.
        then = inputs["data"].get("fingerprint"), inputs.get("eval", rows.eval_fingerprint)
        if then != (rows.data.train.fingerprint, rows.eval_fingerprint):
            raise ConfigError(
                f"{path} was made from other rows (data.train, data.eval): the files, the tokenizer, the template, or "
                "the version of sftmix has changed; bring it back to what it was"
            )
    return config, rows
