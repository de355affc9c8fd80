"""The stages that a command enters, and the options that each is trained with, by the configuration alone."""

from __future__ import annotations

from typing import Literal

from sftmix.common.errors import ConfigError
from sftmix.components.base import Need
from sftmix.components.selection import All
from sftmix.config import RunConfig
from sftmix.options import ReferenceTraining, TrainingOptions, inherit

StageName = Literal["reference", "confidence", "split", "train"]

ALL = ("selection", "reference", "confidence", "split", "train", "baseline", "base")
"""The stages in the order in which they are entered."""


def is_single_run(config: RunConfig) -> bool:
    """Return True if the target's own losses give the confidence; confidence and split are then made in training."""
    uses_confidence = config.resolved_pairing() is not None and Need.CONFIDENCE in config.splitter.needs
    return uses_confidence and Need.TARGET_LOSSES in config.reference.needs


def stages_entered(config: RunConfig, until: StageName) -> list[str]:
    """Return the stages that a command makes or reads back, in order; none that it may turn out not to enter.

    NTP without pairs needs no split, and a split by label no reference. Raises ConfigError for a stage that this
    configuration does not have.
    """
    single, scored = is_single_run(config), Need.CONFIDENCE in config.splitter.needs
    if single and until != "train":
        raise ConfigError(
            f"--reference {type(config.reference).__name__} takes the losses of the target's own training, so "
            f"there is no {until} before it: use `run`, or another --reference"
        )
    if until == "confidence" and not scored:
        raise ConfigError(
            f"--splitter {type(config.splitter).__name__} needs no confidence, so there is none to make: leave it out "
            "here, or use `split`"
        )
    stages: set[str] = {until}
    if not isinstance(config.selector, All):
        stages.add("selection")
    if until == "train":
        stages |= {"base", "baseline"} if config.with_baseline else {"base"}
        if config.resolved_pairing() is not None and not single:
            stages.add("split")
    if "split" in stages and scored:
        stages.add("confidence")
    if "confidence" in stages:
        stages.add("reference")
    return [stage for stage in ALL if stage in stages]


def training_of_reference(config: RunConfig, own: ReferenceTraining | None = None) -> tuple[TrainingOptions, int]:
    """Return options and seed of the reference's training: its own, and the run's where it sets none.

    own  None: `reference.training`
    """
    own = own or config.reference.training
    seed = config.seed if own is None or own.seed is None else own.seed
    return inherit(config.training, own), seed
