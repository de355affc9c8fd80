"""Refusals of a run and of an export that need no model: they come before torch is imported."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sftmix.common.errors import ConfigError, SFTMixError
from sftmix.common.files import BEST, CHECKPOINTS, MANIFEST, is_there, steps_in
from sftmix.common.launcher import needs_torchrun
from sftmix.common.plain import as_list
from sftmix.config import RunConfig
from sftmix.config.read import read_finished
from sftmix.data.encoders import template_source
from sftmix.data.sources import check_names
from sftmix.model.paths import model_at_hand, named, refuse_adapters, refuse_pickles
from sftmix.options import SHARDED
from sftmix.pipeline.directory import Hold, is_finished, origin, refuse_others
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


def export_run(
    run: str | Path,
    to: str | Path,
    *,
    checkpoint: int | None = None,
    best: bool = False,
    dtype: str = "auto",
    merge: bool = False,
) -> Path:
    """Write a checkpoint of the train stage of a run as a Hugging Face model directory.

    checkpoint  its step; None: the newest one
    best        the weights of the best held-out evaluation, which a run with checkpoint.keep_best keeps
    merge       of a run with adapters: the whole model with the adapters in its weights, which loads without PEFT; of a
                finished run without checkpoints those of train/model
    Raises ConfigError where there is no such checkpoint, `to` exists or there is nothing to merge, CheckpointError
    where it is damaged, DifferenceError where train/model is.
    """
    run, to = Path(run), Path(to)
    if is_there(to):
        raise ConfigError(f"{to} exists; name a directory that does not")
    config = read_finished(run)
    if merge and not config.model.lora.r:
        raise ConfigError(f"--merge: {run} trained all weights (model.lora.r is not set); export it without --merge")
    if best and checkpoint is not None:
        raise ConfigError(f"--best and --step {checkpoint} exclude each other: each names a checkpoint")
    stored, model = origin(run / "train") / (BEST if best else CHECKPOINTS), run / "train" / "model"
    steps = steps_in(stored)
    if merge and not (steps or best) and checkpoint is None and is_finished(model.parent):
        stored = model
    elif not steps:
        remedy = "a run writes some with --checkpoint.every N, the best with --checkpoint.keep_best true"
        if model.exists() and not best:
            remedy = f"{model} holds the model after the last step, in the form that export writes: copy it"
        raise ConfigError(f"{stored} has no checkpoint; {remedy}")
    elif checkpoint not in (None, *steps):
        raise ConfigError(f"{stored} has no checkpoint {checkpoint}; it has {', '.join(map(str, steps))}")
    from sftmix.pipeline.loaded import export_stored

    return export_stored(config, stored, to, step=checkpoint, dtype=dtype, merge=merge)
