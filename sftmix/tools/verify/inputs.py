"""The configuration, rows and models of a run, compared with what its stages recorded when they began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json, sha256_file
from sftmix.common.tables import read_ids
from sftmix.common.world import World
from sftmix.config import RunConfig
from sftmix.config.read import read_config
from sftmix.data import EncodedDataset
from sftmix.pipeline.directory import differences
from sftmix.pipeline.identity import STAGE_INPUTS, Known, selection_inputs
from sftmix.pipeline.rows import RunRows, read_rows, tokenised_rows
from sftmix.pipeline.stages import ALL, stages_entered
from sftmix.tools.verify.certificate import Finding, listed
from sftmix.tools.verify.window import Window


def config_of(window: Window) -> RunConfig:
    """Read the configuration of a run, as its stages were told it."""
    config = replace(read_config(window.run / "config.yaml"), out=str(window.run))
    return replace(config, with_baseline=True) if window.stage == "baseline" else config


class Inputs:
    """The rows of a run as they are now, and what else its stages are made from.

    all_rows  the rows before the selection, if there is one
    """

    all_rows: EncodedDataset

    def __init__(self, window: Window, config: RunConfig, world: World) -> None:
        self._window, self._world = window, world
        self.config, prepared = read_rows(config, world, progress=world.is_main)
        self.rows: RunRows = tokenised_rows(self.config, prepared, world, select=self._select, progress=world.is_main)

    def _select(self, rows: EncodedDataset) -> Sequence[str]:
        self.all_rows = rows
        return read_ids(self._window.run / "selection" / "selected.parquet")

    def findings(self, stages: Sequence[str]) -> list[Finding]:
        """Compare the inputs of these stages; all ranks call it and have the same result."""
        findings = []
        for stage in stages:
            recorded = read_json(self._window.run / stage / "inputs.json")
            now = self._inputs(stage)
            _refuse_other_precision(self.config, recorded, now)
            different = differences(recorded, now)
            findings += [Finding("inputs", False, f"{stage}: {told}", False, blocks=True) for told in different]
        if not findings:
            findings.append(Finding("inputs", True, f"options, seed, rows and model as {listed(stages)} recorded"))
        return [*findings, *self._checkpoints()]

    def precision(self, stage: str) -> str:
        """Return the precision that a trained stage recorded, fp32 or bf16."""
        return str(read_json(self._window.run / stage / "inputs.json", training=dict)["training"].get("precision"))

    def _inputs(self, stage: str) -> dict[str, Any]:
        known = Known(self.config, self._world, self.rows, self._window.run)
        return (
            selection_inputs(known, self.all_rows.fingerprint) if stage == "selection" else STAGE_INPUTS[stage](known)
        )

    def _checkpoints(self) -> list[Finding]:
        """Compare the inputs that the checkpoints at both ends of the window recorded, by their hash."""
        expected = sha256_file(self._window.identity)
        findings = []
        for step in {self._window.start, self._window.end} & set(self._window.kept):
            found = read_json(self._window.checkpoint(step) / "state.json").get("identity")
            if found != expected:
                place = f"hash of the inputs of {self._window.checkpoint(step)}"
                findings.append(Finding("inputs", False, place, False, expected, found, blocks=True))
        return findings


def stages_before(config: RunConfig, window: Window) -> list[str]:
    """List the stages that the window's stage is made from, in order, and itself."""
    entered = {*stages_entered(config, "train", window.run), window.stage}
    upto = ALL[: ALL.index(window.stage) + 1]
    return [stage for stage in upto if stage in entered and _began(window.run, stage)]


def _began(run: Path, stage: str) -> bool:
    return (run / stage / "inputs.json").exists()


def _refuse_other_precision(config: RunConfig, recorded: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError where training.precision auto means something else on this machine."""
    for group in ("computed", "training"):
        then, here = (inputs.get(group, {}).get("precision") for inputs in (recorded, now))
        if config.training.precision == "auto" and then and here and then != here:
            raise ConfigError(
                f"training.precision is auto, which was {then} where the run was made and is {here} here: numbers "
                f"cannot be compared; verify it on a device with {then}"
            )
