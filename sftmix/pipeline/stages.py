"""The stages that a command enters, and the options that each is trained with, by the configuration alone."""

from __future__ import annotations

from pathlib import Path
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


def stages_needed(config: RunConfig, until: StageName) -> set[str]:
    """Return the stages that `until` needs: NTP without pairs needs no split, a split by label no reference.

    Raises ConfigError for a stage that this configuration does not have.
    """
    if is_single_run(config):
        if until == "train":
            return {"train"}
        raise ConfigError(
            f"--reference {type(config.reference).__name__} takes the losses of the target's own training, so "
            f"there is no {until} before it: use `run`, or another --reference"
        )
    if until == "confidence" and Need.CONFIDENCE not in config.splitter.needs:
        raise ConfigError(
            f"--splitter {type(config.splitter).__name__} needs no confidence, so there is none to make: leave it out "
            "here, or use `split`"
        )
    needed: set[str] = {until}
    if until == "train" and config.resolved_pairing() is not None:
        needed.add("split")
    if "split" in needed and Need.CONFIDENCE in config.splitter.needs:
        needed.add("confidence")
    if "confidence" in needed:
        needed.add("reference")
    return needed


def stages_entered(config: RunConfig, until: StageName, directory: Path) -> list[str]:
    """Return every stage that a command makes or reads back, in order; none that it may turn out not to enter.

    directory  the run directory; a split that an earlier command made there is read back for the summary
    """
    stages, again = stages_needed(config, until), set[str]()
    if not isinstance(config.selector, All):
        stages.add("selection")
    if until == "train":
        stages |= {"base", "baseline"} if config.with_baseline else {"base"}
    if "split" not in stages and not is_single_run(config) and (directory / "split" / "figures.json").exists():
        again = {"reference", "confidence", "split"} if Need.CONFIDENCE in config.splitter.needs else {"split"}
    return [*(stage for stage in ALL if stage in stages), *(stage for stage in ALL if stage in again - stages)]


def training_of_reference(config: RunConfig) -> tuple[TrainingOptions, int]:
    """Return options and seed of the reference's training: `reference.training`, and the run's where it sets none."""
    return training_with(config, config.reference.training)


def training_with(config: RunConfig, own: ReferenceTraining | None) -> tuple[TrainingOptions, int]:
    """Return the run's training options and seed, replaced by those that the reference sets itself."""
    seed = config.seed if own is None or own.seed is None else own.seed
    return inherit(config.training, own), seed
