"""A checkpoint of a run as a Hugging Face model directory. What is refused is refused before torch is imported."""

from __future__ import annotations

from pathlib import Path

from sftmix.common.checkpoints import BEST, CHECKPOINTS, steps_in
from sftmix.common.errors import ConfigError
from sftmix.common.names import is_there
from sftmix.config.read import read_finished
from sftmix.model.paths import model_place
from sftmix.pipeline.directory import is_finished, origin
from sftmix.pipeline.finished import refuse_no_run


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
    refuse_no_run(run)
    if is_there(to):
        raise ConfigError(f"{to} exists; name a directory that does not")
    config = read_finished(run)
    if merge and not config.model.lora.r:
        raise ConfigError(f"--merge: {run} trained all weights (model.lora.r is not set); export it without --merge")
    if best and checkpoint is not None:
        raise ConfigError(f"--best and --step {checkpoint} exclude each other: each names a checkpoint")
    model_place(config.model.path)
    kept, model = origin(run / "train") / (BEST if best else CHECKPOINTS), run / "train" / "model"
    steps = steps_in(kept)
    if merge and not steps and not best and checkpoint is None and is_finished(model.parent):
        kept = model
    elif best and not steps:
        raise ConfigError(
            f"--best: {kept} has no weights; a run keeps those of its best evaluation with "
            "--checkpoint.keep_best true and held-out rows"
        )
    elif not steps:
        remedy = f"{model} holds the model after the last step, in the form that export writes: copy it"
        remedy = remedy if model.exists() else "a run writes some with --checkpoint.every N"
        raise ConfigError(f"{kept} has no checkpoint; {remedy}")
    elif checkpoint not in (None, *steps):
        raise ConfigError(f"{kept} has no checkpoint {checkpoint}; it has {', '.join(map(str, steps))}")
    from sftmix.pipeline.models import export_stored

    return export_stored(config, kept, to, step=checkpoint, dtype=dtype, merge=merge)
