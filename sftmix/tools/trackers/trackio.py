"""trackio: an SQLite file of the user (TRACKIO_DIR), or a Space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftmix.tools.trackers.base import Tracker
from sftmix.tools.trackers.rows import STAGES, Row

_SUMMARY = "summary/"


class Trackio(Tracker):
    """A run of trackio, on this machine, for `trackio show`; `trackio sync` sends it to a Space."""

    package = client = "trackio"

    def __init__(self, *, project: str = "sftmix"):
        """project: where the run is shown."""
        self.project = project

    def open(self, run: Path, config: Mapping[str, Any]) -> int:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        name = f"{run.name}-{self.identity(run)[:8]}"  # a run is resumed by its name
        self._client = trackio.init(project=self.project, name=name, resume="allow", config=dict(config), embed=False)
        logs = SQLiteStorage.get_logs(self.project, name)
        self._figures = [_summary_of(log) for log in logs if _summary_of(log)]
        return sum(any(key.partition("/")[0] in STAGES for key in log) for log in logs)

    def write(self, row: Row) -> None:
        self._client.log(dict(row.values), step=row.step)

    def summarise(self, figures: Mapping[str, float]) -> None:
        new = {f"{_SUMMARY}{name}": value for name, value in figures.items()}
        if self._figures[-1:] != [new]:
            self._client.log(new, step=0)

    def close(self) -> None:
        self._client.finish()


def _summary_of(log: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in log.items() if key.startswith(_SUMMARY)}
