"""The stages that a command enters, and the inputs of each: a stage is read back only if all of them are equal.

Importing this module imports no torch, so that a command can be refused before it is loaded: what the configuration
alone decides is known at once, and the rest is UNKNOWN until ranks and rows are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sftmix.common.errors import ConfigError
from sftmix.common.files import sha256_file
from sftmix.components.base import Callback, Component, Need, files_of, plain
from sftmix.components.objectives import NTP
from sftmix.components.selection import All
from sftmix.config import RunConfig
from sftmix.options import LAYOUT, ReferenceTraining, TrainingOptions, inherit, reference_lora
from sftmix.pipeline.directory import UNKNOWN, Inputs

if TYPE_CHECKING:
    from sftmix.common.world import World
    from sftmix.pipeline.rows import RunRows

StageName = Literal["reference", "confidence", "split", "train"]


def is_single_run(config: RunConfig) -> bool:
    """Return True if the target's own losses give the confidence; confidence and split are then made in training."""
    paired = config.resolved_pairing() is not None
    return paired and config.uses_dynamics() and Need.TARGET_LOSSES in config.reference.needs


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
    confidence = until == "confidence" or (split and Need.CONFIDENCE in config.splitter.needs)
    stages = {
        "selection": not isinstance(config.selector, All),
        "reference": until == "reference" or (confidence and Need.CONFIDENCE not in config.confidence.gives),
        "confidence": confidence,
        "split": split,
        "train": train,
        "baseline": train and config.with_baseline,
        "base": train,
    }
    return [stage for stage, entered in stages.items() if entered]


def training_of_reference(config: RunConfig, training: ReferenceTraining | None = None) -> tuple[TrainingOptions, int]:
    """Return options and seed of the reference's training: its own, and the run's where it sets none.

    training  None: `reference.training`
    """
    training = training or config.reference.training
    seed = config.seed if training is None or training.seed is None else training.seed
    return inherit(config.training, training), seed


class Known(NamedTuple):
    """What is known of a run when the inputs of a stage are named.

    world      the ranks; None: neither files nor devices were looked at
    rows       the rows; None: they were not read
    directory  the run directory, with the files of the stages before; None: those may still be to be made
    """

    config: RunConfig
    world: World | None = None
    rows: RunRows | None = None
    directory: Path | None = None

    def ask(self, question: Callable[[], Any]) -> Any:
        """Return, on every rank, what rank 0 answers, which looks at files or devices; raise its error on each."""
        return UNKNOWN if self.world is None else self.world.from_main(question)


# ------------------------------------------------------------------------------------------ parts of inputs


def _fingerprint(name: str) -> str | None:
    """Return the identity of a file or a model; None if it cannot be read, which its reader will explain."""
    from sftmix.model.load import fingerprint

    try:
        return fingerprint(name)
    except ConfigError:
        return None


def _files(known: Known, *components: Component | None) -> Any:
    """Return the fingerprints of the files of components, by their names.

    Raises what `files()` raises, on every rank, and before torch is imported, too.
    """
    names = [name for component in components if component is not None for name in files_of(component)]
    return known.ask(lambda: {name: _fingerprint(name) for name in names})


def _made(known: Known, name: str) -> str:
    """Return the hash of a file that an earlier stage of the run made."""
    directory = known.directory
    return UNKNOWN if directory is None else known.ask(lambda: sha256_file(directory / name))


def _precision(known: Known, options: TrainingOptions) -> str:
    """Return fp32 or bf16; what `auto` means depends on the device, so it is UNKNOWN without ranks."""
    if known.world is None:
        return UNKNOWN if options.precision == "auto" else options.precision
    from sftmix.training.module import resolve_precision

    return resolve_precision(options.precision, known.world.device)


def _data(known: Known) -> Inputs:
    """Return the identity of the training rows, and the options behind it, so that a refusal can name them."""
    data, rows = known.config.data, known.rows
    names = ("limit", "take", "eval_fraction", "columns", "multi_turn", "format", "packing", "labels", "special_tokens")
    inputs = {name: getattr(data, name) for name in names}
    if rows is None and data.format == "auto":  # which may turn out to be plain text
        inputs["format"] = UNKNOWN
    return {
        **inputs,
        "max_length": rows.data.report.max_length if rows else data.max_length or UNKNOWN,
        "template": rows.encoder.name if rows else UNKNOWN,
        "fingerprint": rows.data.train.fingerprint if rows else UNKNOWN,
    }


def _rows_and_model(known: Known) -> Inputs:
    """Return the training rows, the model, and the options of its computation that decide numbers."""
    config = known.config
    return {
        "data": _data(known),
        "model": known.ask(lambda: _fingerprint(config.model.path)),
        "computed": {"precision": _precision(known, config.training), "attention": config.model.attention},
    }


def _training(known: Known, options: TrainingOptions) -> Inputs:
    """Return the training options that decide the result; others say how a step is computed, and may change."""
    values = {**plain(options), "precision": _precision(known, options)}
    return {k: v for k, v in values.items() if k not in (*LAYOUT, "timeout")}


def _deciding(callbacks: Sequence[Callback]) -> Sequence[Callback]:
    """Return those that may change the course of a training, with those whose evaluations they may see."""
    stops = any(Need.STOP in callback.gives for callback in callbacks)
    return [callback for callback in callbacks if callback.gives and stops]


# ------------------------------------------------------------------------------------------- the stages


def selection_inputs(known: Known) -> Inputs:
    """Return the inputs of the selection."""
    selector = known.config.selector
    return {
        "data": known.rows.whole.fingerprint if known.rows else UNKNOWN,
        "selector": selector.spec(),
        "seed": known.config.seed,
        "selector_files": _files(known, selector),
    }


def reference_inputs(known: Known) -> Inputs:
    """Return the inputs of the reference; one that is not trained adds only its files."""
    config, reference = known.config, known.config.reference
    trains = Need.TRAINING in reference.needs
    deciding = _deciding([callback for callback in config.callbacks if Need.HELD_OUT not in callback.needs])
    spec, elsewhere = reference.spec(), {*reference.layout, *(["training"] if trains else [])}  # or deciding nothing
    inputs = {
        **_rows_and_model(known),
        "reference": spec | {"init_args": {k: v for k, v in spec["init_args"].items() if k not in elsewhere}},
        "reference_files": _files(known, reference, *([config.optimizer, *deciding] if trains else [])),
    }
    if trains:
        training, seed = training_of_reference(config)
        lora = reference_lora(config.model, reference.model)
        inputs |= {
            "optimizer": config.optimizer.spec(),
            "lora": plain(lora) if lora.r else None,
            "training": _training(known, training),
            "callbacks": plain(deciding),
            "seed": seed,
        }
    return inputs


def confidence_inputs(known: Known) -> Inputs:
    """Return the inputs of the confidence."""
    estimator = known.config.confidence
    return {
        "dynamics": None if Need.CONFIDENCE in estimator.gives else _made(known, "confidence/dynamics.parquet"),
        "confidence": estimator.spec(),
        "confidence_files": _files(known, estimator),
    }


def split_inputs(known: Known) -> Inputs:
    """Return the inputs of the split."""
    splitter = known.config.splitter
    return {
        "data": _data(known),
        "confidence": _made(known, "confidence/confidence.parquet") if Need.CONFIDENCE in splitter.needs else None,
        "splitter": splitter.spec(),
        "seed": known.config.seed,
        "splitter_files": _files(known, splitter),
    }


def config_of_arm(config: RunConfig, name: str) -> RunConfig:
    """Return the configuration of a trained arm, train or baseline: the baseline is plain NTP."""
    return replace(config, objective=NTP(), perturbation=None) if name == "baseline" else config


def arm_inputs(known: Known, name: str) -> Inputs:
    """Return the inputs of a trained arm, train or baseline. Their order is part of its checkpoints' identity."""
    config, lora = config_of_arm(known.config, name), known.config.model.lora
    pairing, single = known.config.resolved_pairing(), is_single_run(known.config)  # both arms have one order
    deciding, paired = _deciding(config.callbacks), pairing is not None and not single
    scored = paired and Need.CONFIDENCE in config.splitter.needs  # pair samplers see the confidence, too
    inputs = {
        **_rows_and_model(known),
        "eval": known.rows.eval_fingerprint if known.rows else UNKNOWN,
        "dtype": config.model.dtype,
        "lora": plain(lora) if lora.r else None,
        "split": _made(known, "split/split.parquet") if paired else None,
        "confidence": _made(known, "confidence/confidence.parquet") if scored else None,
        "pairing": plain(pairing),
        "objective": config.objective.spec(),
        "optimizer": config.optimizer.spec(),
        "perturbation": plain(config.perturbation),
        "seed": config.seed,
        "files": _files(known, pairing, config.objective, config.optimizer, config.perturbation, *deciding),
        "training": _training(known, config.training),
        "callbacks": plain(deciding),
    }
    if single:
        chosen = (config.reference, config.confidence, config.splitter)
        inputs["online"] = [{**component.spec(), "files": _files(known, component)} for component in chosen]
    return inputs


def base_inputs(known: Known) -> Inputs:
    """Return the inputs of the measurement of the base model."""
    return {
        **_rows_and_model(known),
        "eval": known.rows.eval_fingerprint if known.rows else UNKNOWN,
        "quantize": known.config.model.lora.quantize,
    }


STAGE_INPUTS: Mapping[str, Callable[[Known], Inputs]] = {
    "selection": selection_inputs,
    "reference": reference_inputs,
    "confidence": confidence_inputs,
    "split": split_inputs,
    "train": lambda known: arm_inputs(known, "train"),
    "baseline": lambda known: arm_inputs(known, "baseline"),
    "base": base_inputs,
}
"""Stage -> its inputs, as far as they are known."""
ALL = tuple(STAGE_INPUTS)
"""The stages in the order in which they are entered."""
