"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftmix.tools.trackers.base import Tracker
from sftmix.tools.trackers.rows import STAGES, Row


class WandB(Tracker):
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in RUN/trackers/wandb, for `wandb sync`."""

    package = client = "wandb"

    def __init__(self, *, project: str = "sftmix"):
        """project: where the run is shown."""
        self.project = project

    def open(self, run: Path, config: Mapping[str, Any]) -> int:
        import wandb

        self._client = wandb.init(
            project=self.project,
            id=self.identity(run),
            name=run.name,
            resume="allow",
            dir=str(self.folder(run).parent),  # in which wandb makes its folder, which has the name of ours
            config=dict(config),
            settings=wandb.Settings(console="off"),  # it would wrap stderr, and with it the live line
        )
        for stage in STAGES:  # a step of W&B is a row; charts go by the step of the stage
            self._client.define_metric(f"{stage}/step", hidden=True)
            self._client.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        # Online this is what the server has. Offline it is 0: every process begins a new directory, which gets all
        # rows, so that the newest one is the whole run.
        return int(self._client.step)

    def write(self, row: Row) -> None:
        more = {f"{row.stage}/step": row.step, "_timestamp": row.time}
        self._client.log({**row.values, **more}, step=row.number)

    def summarise(self, figures: Mapping[str, float]) -> None:
        self._client.summary.update({f"summary/{name}": value for name, value in figures.items()})

    def close(self) -> None:
        self._client.finish()
