"""Export of a checkpoint of a run, refused before torch is imported if there is no such checkpoint."""

from dataclasses import replace
from pathlib import Path

from sftmix.disk.files import BEST, CHECKPOINTS, steps_in
from sftmix.pipeline.signature import is_own
from sftmix.pipeline.start import made_from
from sftmix.pipeline.validity import is_finished, origin
from sftmix.text.windows import Documents
from sftmix.tools.runs.models import FinishedModel
from sftmix.tools.runs.read import as_started, read_finished
from sftmix.words.errors import ConfigError
from sftmix.words.fields import TEXT


def export_run(
    run: Path,
    to: Path,
    *,
    checkpoint: int | None = None,
    best: bool = False,
    dtype: str = "auto",
    merge: bool = False,
) -> int | None:
    """Write a checkpoint of the train stage of a run as a Hugging Face model directory; return its step.

    checkpoint  its step; None: the newest one
    best        the weights of the best held-out evaluation, which a run with checkpoint.keep_best keeps
    merge       for a run with adapters: the whole model with the adapters in its weights, which loads without PEFT; for
                a finished run without checkpoints, the adapters of train/model, whose step is None
    Raises ConfigError if there is no such checkpoint or nothing to merge, CheckpointError if it is damaged,
    DifferenceError if train/model is.
    """
    run, to = run.absolute(), to.absolute()  # `as_started` moves relative names
    config = read_finished(run)
    if merge and not config.model.lora.r:
        raise ConfigError(f"--merge: {run} trained all weights (model.lora.r is not set); export it without --merge")
    if best and checkpoint is not None:
        raise ConfigError(f"--best and --step {checkpoint} exclude each other: each names a checkpoint")
    stored, model = _made_in(run / "train") / (BEST if best else CHECKPOINTS), run / "train/model"
    steps = steps_in(stored) or steps_in(stored)  # a save may have replaced the only one during the first look
    if merge and not (steps or best) and checkpoint is None and is_finished(model.parent):
        stored = model
    elif not steps:
        remedy = "a run writes some with --checkpoint.every N, the best with --checkpoint.keep_best true"
        if model.exists() and not best:
            remedy = f"{model} holds the model after the last step, in the form that export writes: copy it"
        raise ConfigError(f"{stored} has no checkpoint; {remedy}")
    elif checkpoint not in (None, *steps):
        raise ConfigError(f"{stored} has no checkpoint {checkpoint}; it has {', '.join(map(str, steps))}")
    from sftmix.tools.runs.loaded import encoder_of
    from sftmix.tools.runs.stored import export_stored

    encoder = encoder_of(FinishedModel("base", config.model.path, run))  # a checkpoint is put into its base
    if made_from(run)["data"]["template"] == TEXT:  # then the tokenizer keeps its own, or none
        encoder = replace(encoder, renderer=Documents())
    with as_started(run):
        return export_stored(config, encoder, stored, to, step=checkpoint, dtype=dtype, merge=merge)


def _made_in(stage: Path) -> Path:
    """Return the stage with the checkpoints: an adopted one has none, as only its outputs were taken over.

    Between two runs that are not both the user's own it is not followed: it leads out of the run that is read.
    """
    made = origin(stage)
    return made if is_own(stage.parent) and is_own(made.parent) else stage
