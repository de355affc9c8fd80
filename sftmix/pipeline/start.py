"""Start of a command: the stages that it enters, and what is refused before any of them is made.

Importing this module imports no torch, so that a command can be refused before it is loaded.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from sftmix.common.errors import ConfigError, SFTMixError, refuse
from sftmix.common.files import MANIFEST
from sftmix.common.launcher import needs_torchrun
from sftmix.common.places import is_there, place_of
from sftmix.common.plain import as_list
from sftmix.components.selection import All
from sftmix.config import RunConfig
from sftmix.config.checks import confidence_problems
from sftmix.data.encoders import template_source
from sftmix.data.sources import check_names
from sftmix.model.paths import model_at_hand, named, refuse_files
from sftmix.options import SHARDED
from sftmix.pipeline.inputs import STAGE_INPUTS, Known, config_of_reference, is_single_run
from sftmix.pipeline.lock import Hold
from sftmix.pipeline.stages import refuse_others

StageName = Literal["reference", "confidence", "split", "train"]


def stages_entered(config: RunConfig, until: StageName) -> list[str]:
    """Return the stages that a command makes or reads back, in order; none that it may turn out not to enter.

    NTP without pairs needs no split, and a split by label no reference. Raises ConfigError for a stage that this
    configuration does not have.
    """
    single, train = is_single_run(config), until == "train"
    if single and not train:
        raise ConfigError(
            f"--reference {type(config.reference).__name__} takes the losses of the target's own training, so "
            f"there is no {until} before it: use `run`, or another --reference"
        )
    split = until == "split" or (train and config.resolved_pairing() is not None and not single)
    confidence = until == "confidence" or (split and config.split_needs_confidence())
    stages = {
        "selection": not isinstance(config.selector, All),
        "reference": until == "reference" or (confidence and config.confidence_needs_dynamics()),
        "confidence": confidence,
        "split": split,
        "train": train,
        "baseline": train and config.with_baseline,
        "base": train,
    }
    return [stage for stage, entered in stages.items() if entered]


def check_start(config: RunConfig, until: StageName) -> None:
    """Raise what `run` would raise anyway, as far as it is certain without torch: what `check_run` and `Hold` raise."""
    check_directory(config)
    with holding(config.out or ""):
        check_run(config, until)


@contextlib.contextmanager
def holding(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a directory on the first rank while every rank makes the same checks; one of them reports an error."""
    with Hold(directory):
        try:
            yield
        except SFTMixError as error:
            error.everywhere = True
            raise


def check_run(config: RunConfig, until: StageName) -> None:
    """Raise an error if rows or models are not there, the directory holds other work, or fsdp lacks torchrun.

    Raise ConfigError, too, for a confidence that its reference cannot serve, also where nothing is mixed.
    """
    directory, stages, own = Path(config.out or ""), stages_entered(config, until), config_of_reference(config)
    check_names_given(config)
    if "reference" in stages and own.model.path != config.model.path:  # a look at the hub for each
        with named("reference.model.path"):
            model_at_hand(own.model.path)
    refuse_other_inputs(Known(config), stages, directory)
    if "confidence" in stages and config.confidence_needs_dynamics():
        refuse(list(confidence_problems(config)), "the configuration")
    by_ranks = {"train", "baseline", "base", *(["reference"] if config.reference.needs else [])}
    missing = [stage for stage in stages if stage in by_ranks and not (directory / stage / MANIFEST).exists()]
    if missing and "RANK" not in os.environ:
        for options in (config.training, own.training):
            if options.parallel in SHARDED:
                raise ConfigError(needs_torchrun(options.parallel))


def check_names_given(config: RunConfig) -> None:
    """Raise DataError or ConfigError if files of rows, the template, or the model are not there."""
    data, path = config.data, config.model.path
    check_names(as_list(data.train), "data.train", data.format)
    check_names(as_list(data.eval or []), "data.eval", data.format)
    if data.template is not None:
        template_source(data.template)
    model_at_hand(path)
    refuse_files(path)


def refuse_other_inputs(known: Known, stages: Sequence[str], directory: Path) -> None:
    """Raise ConfigError if one of the stages was made, or begun, from other inputs.

    Every stage is compared as far as its inputs are known, before the first one is made: a refusal changes nothing.
    """
    for stage in stages:
        refuse = partial(refuse_others, directory / stage, STAGE_INPUTS[stage](known))
        if known.world is None:
            refuse()
        else:
            known.world.on_main(refuse)


def check_directory(config: RunConfig) -> None:
    """Raise ConfigError for a directory with files that a run would replace, or that the run reads its inputs from."""
    directory = Path(config.out or "")
    for file in (directory / name for name in ("config.yaml", "summary.json")):
        if is_there(file) and not any(directory.glob("*/inputs.json")):  # which a run writes before any other
            raise ConfigError(f"out: no run wrote {file}, and this one would replace it; name another directory")
    read = {"model.path": config.model.path, "reference.model.path": config_of_reference(config).model.path}
    read |= {f"data.{key}": name for key in ("train", "eval") for name in as_list(getattr(config.data, key) or [])}
    for key, name in read.items():
        if is_there(directory) and is_there(place := place_of(name)) and os.path.samefile(place, directory):
            raise ConfigError(f"out: {directory} is {key} as well, whose files a run would add to; name another one")
