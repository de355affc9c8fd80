"""SwanLab."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftmix.tools.trackers.base import Tracker
from sftmix.tools.trackers.rows import Row


class SwanLab(Tracker):
    """An experiment of SwanLab; SWANLAB_MODE=offline keeps it in RUN/trackers/swanlab, for `swanlab sync`."""

    package = client = "swanlab"

    def __init__(self, *, project: str = "sftmix"):
        """project: where the run is shown."""
        self.project = project

    def open(self, run: Path, config: Mapping[str, Any]) -> int:
        import swanlab

        self._client = swanlab.init(
            project=self.project,
            id=self.identity(run),
            name=run.name,
            resume="allow",
            log_dir=str(self.folder(run)),
            config=dict(config),
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),  # else stderr is wrapped, with the live line
        )
        # Offline every process begins a new directory, which gets all rows. Online the client knows the last step that
        # the server has of each metric, and leaves out what comes before.
        return 0

    def write(self, row: Row) -> None:
        self._client.log(dict(row.values), step=row.step)

    def summarise(self, figures: Mapping[str, float]) -> None:
        self._client.config.update({"summary": dict(figures)})

    def close(self) -> None:
        self._client.finish()
