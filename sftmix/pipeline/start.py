"""Refusals that need no model: they come before torch is imported, and before a stage is made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sftmix.common.errors import ConfigError, SFTMixError
from sftmix.common.files import MANIFEST
from sftmix.common.launcher import needs_torchrun
from sftmix.common.plain import as_list
from sftmix.config import RunConfig
from sftmix.data.encoders import template_source
from sftmix.data.sources import check_names
from sftmix.model.paths import model_at_hand, named, refuse_adapters, refuse_pickles
from sftmix.options import SHARDED
from sftmix.pipeline.directory import Hold, refuse_others
from sftmix.pipeline.identity import STAGE_INPUTS, Known, StageName, stages_entered, training_of_reference


def check_start(config: RunConfig, until: StageName) -> None:
    """Raise what `run` would raise anyway, as far as it is certain without a model, and without torch.

    These are the errors of `check_run`, and a directory that cannot be written or is in use. STATUS.json tells of the
    error, unless the run has come as far as a stage.
    """
    with holding(config.out or ""):
        check_run(config, until)


@contextlib.contextmanager
def holding(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a directory on the first rank while every rank makes the same checks; one of them tells of an error."""
    with Hold(directory, main=os.environ.get("RANK", "0") == "0"):
        try:
            yield
        except SFTMixError as error:
            error.everywhere = True
            raise


def check_run(config: RunConfig, until: StageName) -> None:
    """Raise an error if rows or models are not there, the directory holds other work, or fsdp lacks torchrun."""
    directory, stages = Path(config.out or ""), stages_entered(config, until)
    check_names_given(config)
    of_reference = config.reference.model
    if "reference" in stages and of_reference and of_reference.path:
        with named("reference.model.path"):
            model_at_hand(of_reference.path)
    refuse_other_inputs(Known(config), stages, directory)
    if "RANK" not in os.environ and not all((directory / stage / MANIFEST).exists() for stage in stages):
        for options in (config.training, training_of_reference(config)[0]):
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
    refuse_adapters(path)
    refuse_pickles(path)


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
