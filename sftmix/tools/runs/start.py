"""Start of a command: what is refused before anything is made. Importing this module imports no torch."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from sftmix.config import RunConfig
from sftmix.config.checks import confidence_problems
from sftmix.config.wants import Wants
from sftmix.data.sources import check_names
from sftmix.disk.files import MANIFEST
from sftmix.disk.places import PathLike, is_there
from sftmix.model.paths import named, refuse_files
from sftmix.options.training import SHARDED
from sftmix.pipeline.context import refuse_other_inputs
from sftmix.pipeline.inputs import Known, config_of_reference
from sftmix.pipeline.lock import Hold
from sftmix.pipeline.stages import REFERENCE
from sftmix.pipeline.start import check_directory, wanted_stages
from sftmix.ranks.launcher import needs_torchrun
from sftmix.text.templates import template_source
from sftmix.tools.runs.models import model_at_hand
from sftmix.words.errors import ConfigError, SFTMixError, refuse
from sftmix.words.given import as_list


def check_start(config: RunConfig, until: str) -> None:
    """Raise what `run` would raise anyway, as far as it is certain without torch.

    That is what `check_run` and `Hold` raise. Without rows or a model no directory is made; a directory that is there
    has a STATUS.json with the error.
    """
    check_directory(config)
    if not is_there(config.out or "."):
        with reported_once():
            check_names_given(config)
    with holding(config.out or ""):
        check_run(config, until)


@contextlib.contextmanager
def holding(directory: PathLike) -> Iterator[None]:
    """Hold a directory on the first rank while every rank makes the same checks; one of them reports an error."""
    with Hold(directory), reported_once():
        yield


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Let one rank report an error that every rank finds."""
    try:
        yield
    except SFTMixError as error:
        error.everywhere = True
        raise


def doubts(config: RunConfig) -> Iterator[str]:
    """Yield a question about each value that is allowed, and hardly meant."""
    rate = config.training.learning_rate
    if rate > 1:
        usual = "Usual rates are from 1e-6 to 1e-2."
        yield f"warning: training.learning_rate is {rate:g}. Is it meant to be above 1? {usual}"


def check_run(config: RunConfig, until: str) -> None:
    """Raise an error if rows or models are not there, the directory holds other work, or fsdp lacks torchrun.

    Also raise ConfigError for a confidence that its reference cannot serve, also where nothing is mixed.
    """
    directory, stages, own = Path(config.out or ""), wanted_stages(config, until), config_of_reference(config)
    wants = Wants(config, until)
    check_names_given(config)
    if wants.dynamics and own.model.path != config.model.path:  # a look at the hub for each
        with named("reference.model.path"):
            model_at_hand(own.model.path)
    refuse_other_inputs(Known(config), stages, directory)
    if wants.confidence and wants.by_dynamics:
        refuse(list(confidence_problems(config)), "the configuration")
    missing = [stage for stage in stages if stage.by_ranks and not (directory / stage.name / MANIFEST).exists()]
    if not config.reference.needs:  # it only reads a file
        missing = [stage for stage in missing if stage is not REFERENCE]
    for options in (config.training, own.training) if missing else ():
        refuse_one_rank(options.parallel)


def refuse_one_rank(parallel: str, ranks: int | str = "N") -> None:
    """Raise ConfigError if ranks share the weights, and torchrun did not start this process."""
    if parallel in SHARDED and "RANK" not in os.environ:
        raise ConfigError(needs_torchrun(parallel, ranks))


def check_names_given(config: RunConfig) -> None:
    """Raise DataError or ConfigError if files of rows, the template, or the model are not there."""
    data, path = config.data, config.model.path
    for option, names in (("data.train", data.train), ("data.eval", data.eval or [])):
        check_names(as_list(names), option, config.row_format or data.format)
    if data.template is not None:
        template_source(data.template)
    model_at_hand(path)
    refuse_files(path)
