"""What the inputs of stages are put together from; a stage is read back only if all of its inputs are equal.

What the configuration alone decides is known at once, without torch; the rest is UNKNOWN until ranks and rows are
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sftmix.components.base import Callback
from sftmix.components.component import Component, Need, code_of, files_of, to_builtin
from sftmix.components.objectives import NTP
from sftmix.config import RunConfig
from sftmix.config.wants import Wants
from sftmix.disk.hashes import sha256_file
from sftmix.disk.places import is_there
from sftmix.options.reference import inherit, reference_lora
from sftmix.options.training import LAYOUT, TrainingOptions
from sftmix.pipeline.validity import UNKNOWN, Inputs
from sftmix.words.errors import ConfigError

if TYPE_CHECKING:
    from sftmix.pipeline.rows import RunRows
    from sftmix.ranks.world import World

HASHES = {
    "version": "this version of the stage makes other files of the same inputs",
    "model": "the model's files are others (model.path)",
    "data": "the training rows are others (data.train)",
    "data.fingerprint": "the training rows are others, as the model sees them (data.train, selector, tokenizer, "
    "template)",
    "rounding": "the exported weights are rounded in another way (checkpoint.rounding)",
    "eval": "the held-out rows are others, as the model sees them (data.eval, data.eval_fraction)",
}
"""Inputs of several stages that are hashes, in words that name the options behind them."""


def config_of_arm(config: RunConfig, name: str) -> RunConfig:
    """Return the configuration of what is trained: train, or plain NTP (baseline, reference), which keeps no best."""
    if name == "train":
        return config
    return replace(config, objective=NTP(), perturbation=None, checkpoint=replace(config.checkpoint, keep_best=False))


def config_of_reference(config: RunConfig) -> RunConfig:
    """Return the configuration of the reference's training: NTP, its own options, and the run's if it has none."""
    model, training = config.reference.model, config.reference.training
    path, lora = model and model.path, reference_lora(config.model, model)
    return replace(
        config_of_arm(config, "reference"),
        model=replace(config.model, path=path or config.model.path, lora=lora),
        training=inherit(config.training, training),
        seed=config.seed if training is None or training.seed is None else training.seed,
        # Those that look at held-out rows have nothing to do here.
        callbacks=[callback for callback in config.callbacks if Need.HELD_OUT not in callback.needs],
    )


class Known(NamedTuple):
    """What is known of a run when the inputs of a stage are named; fields may be UNKNOWN.

    world      the ranks, by whom files and devices are looked at
    directory  the run directory, with the files of the stages before
    """

    config: RunConfig
    world: World = UNKNOWN
    rows: RunRows = UNKNOWN
    directory: Path = UNKNOWN

    @property
    def wants(self) -> Wants:
        """What the configuration wants of a whole run."""
        return Wants(self.config)


def _fingerprint(name: str) -> str | None:
    """Return the identity of a file or a model; None if it cannot be read, which its reader will explain."""
    from sftmix.model.load import fingerprint

    try:
        return fingerprint(name)
    except ConfigError:
        return None


def files_read(known: Known, *components: Component | None) -> Any:
    """Return the fingerprints of the files of components, by their names, and of classes that are not the package's.

    Raise what `files()` raises on every rank.
    """
    names, code = files_of(components), code_of(components)
    if known.world is UNKNOWN:  # code needs no ranks
        return dict.fromkeys(map(_from_here, names), UNKNOWN) | code  # no file is read yet
    return known.world.from_main(lambda: {_from_here(name): _fingerprint(name) for name in names} | code)


def part_inputs(known: Known, option: str) -> Inputs:
    """Return what decides about the component of an option: itself, and the files that it reads."""
    part = getattr(known.config, option)
    return {option: part.spec(), f"{option}_files": files_read(known, part)}


def _from_here(name: str) -> str:
    """Return a path below the directory of the command from there on, so that a project may be moved as a whole."""
    path, here = Path(name), Path.cwd()  # /project/own.py -> own.py; own.py and org/name stay
    return path.relative_to(here).as_posix() if path.is_absolute() and path.is_relative_to(here) else name


def hash_of(known: Known, name: str, needed: bool = True) -> str | None:
    """Return the hash of a file that an earlier stage of the run made; None if it is not needed, or was removed."""

    def look() -> str | None:
        file = known.directory / name
        return sha256_file(file) if is_there(file) else None

    return known.world.from_main(look) if needed else None


def _precision(known: Known, options: TrainingOptions) -> Any:
    """Return fp32 or bf16; what `auto` means depends on the device, so it is UNKNOWN without ranks."""
    if known.world is UNKNOWN:
        return UNKNOWN if options.precision == "auto" else options.precision
    from sftmix.training.parallel import resolve_precision

    return resolve_precision(options.precision, known.world.device)


def row_inputs(known: Known) -> Inputs:
    """Return the identity of the training rows, and the options behind it, so that a refusal can name them."""
    config, rows = known.config, known.rows
    data = config.data
    names = ["limit", "eval_fraction", "columns", "multi_turn", "format", "packing", "labels", "special_tokens"]
    names += ["thoughts", "template_options", "trained_turns", "roles"]
    inputs = {name: to_builtin(getattr(data, name)) for name in names}
    if rows is UNKNOWN and data.format == "auto":  # which may turn out to be plain text
        inputs["format"] = UNKNOWN
    inputs |= {
        # As resolved: null, and the length that it means for this model, are one value.
        "max_length": data.max_length or rows.data.report.max_length,
        "template": rows.encoder.name,  # the name; its text, as any byte of a row, is in the fingerprint
        "fingerprint": rows.data.train.fingerprint,
    }
    return {
        "data": inputs,
        "row_format": to_builtin(config.row_format),
        "renderer": to_builtin(config.renderer),
        "row_files": files_read(known, config.row_format, config.renderer),
    }


def rows_and_model(known: Known) -> Inputs:
    """Return the training rows, the model, and the options of its computation that decide numbers."""
    config = known.config
    return {
        **row_inputs(known),
        "model": known.world.from_main(lambda: _fingerprint(config.model.path)),
        # bf16 and fp32, sdpa and eager, give other losses, so another confidence.
        "computed": {"precision": _precision(known, config.training), "attention": config.model.attention},
    }


def deciding_options(known: Known, options: TrainingOptions) -> Inputs:
    """Return the training options that decide the result; others say how a step is computed, and may change."""
    values = {**to_builtin(options), "precision": _precision(known, options)}
    return {k: v for k, v in values.items() if k not in (*LAYOUT, "timeout")}  # timeout decides on hanging ranks alone


def deciding_callbacks(callbacks: Sequence[Callback]) -> Sequence[Callback]:
    """Return those that may change the course of a training, with those whose evaluations they may see."""
    stops = any(Need.STOP in callback.gives for callback in callbacks)
    return [callback for callback in callbacks if callback.gives and stops]
