"""The base class of trackers: which rows one lacks, and when they are sent."""

from __future__ import annotations

import atexit
import contextlib
import sys
import uuid
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftmix.common.files import write_text
from sftmix.components.base import Callback, StageState
from sftmix.config.layers import read_yaml
from sftmix.pipeline.hold import Hold
from sftmix.tools.trackers.rows import Row, Rows

FOLDER = "trackers"
"""In the run directory: a folder for each tracker, with its id and what its client keeps on disk."""


class Tracker(Callback):
    """A callback that sends the rows of a run to a client: those that it lacks, each once, in their order.

    `open` says how many rows the client has. A resumed run, or `sftmix track` after it, therefore goes on where the
    client stands, whatever became of the process before. A row is sent when the next step ends, the last one of a stage
    at its end. An error of a client ends no training: it is told once, and the rest is left to `sftmix track`.
    """

    observer = True
    evaluates = False
    client: str
    """The name of the client, for `sftmix track --to` and for its folder."""

    _run: Path | None = None
    _failed = False
    _hold: Hold
    _rows: Rows
    _there: int

    @abstractmethod
    def open(self, run: Path, config: Mapping[str, Any]) -> int:
        """Begin or continue the client's run of a run directory; return the number of rows that it has.

        config  the plain form of the run's configuration
        """

    @abstractmethod
    def write(self, row: Row) -> None:
        """Send a row."""

    @abstractmethod
    def summarise(self, figures: Mapping[str, float]) -> None:
        """Send the numbers of summary.json."""

    @abstractmethod
    def close(self) -> None:
        """Send what is still on its way, and end."""

    def folder(self, run: Path) -> Path:
        """Return this tracker's folder in a run directory."""
        return run / FOLDER / self.client

    def identity(self, run: Path) -> str:
        """Return the id of the client's run; it is made once and kept in the folder."""
        file = self.folder(run) / "id"
        if not file.exists():
            write_text(file, uuid.uuid4().hex[:21])
        return file.read_text(encoding="utf-8")

    def begin(self, run: Path) -> None:
        """Open the client for a run directory, unless it is open; another run's is closed first.

        Raises InUseError if another process sends the rows of this run to the same client.
        """
        if self._run == run:
            return
        self.end()
        file = run / "config.yaml"
        config = read_yaml(file) if file.exists() else {}
        hold = Hold(self.folder(run))
        hold.take()
        self._there = self.open(run, config)
        self._run, self._rows, self._hold = run, Rows(run), hold
        atexit.register(self.end)

    def send(self) -> int:
        """Send the rows that the client lacks; return how many these were."""
        sent = 0
        for row in self._rows.new():
            if row.number >= self._there:
                self.write(row)
                sent += 1
        return sent

    @property
    def rows(self) -> int:
        """Rows of the run so far, those that the client had before included."""
        return self._rows.count

    def end(self) -> None:
        """Close the client, if it is open."""
        if self._run is not None:
            self._run = None
            atexit.unregister(self.end)
            try:
                self.close()
            finally:
                self._hold.release()

    def on_stage_start(self, state: StageState) -> None:
        self._follow(state)

    def on_step_end(self, state: StageState) -> None:
        self._follow(state)

    def on_stage_end(self, state: StageState) -> None:
        self._follow(state)

    def _follow(self, state: StageState) -> None:
        """Send what metrics.jsonl has; the line of this step comes after the callbacks."""
        if self._failed or not state.is_main or state.directory is None:
            return
        try:
            self.begin(state.directory.parent)
            self.send()
        except Exception as error:  # of libraries and networks: no reason to end a training
            self._failed = True
            with contextlib.suppress(Exception):
                self.end()  # gives the lock back, for `sftmix track`
            told = f"{type(self).__name__} failed, and the run goes on without it: {error}"
            again = f"`sftmix track {state.directory.parent} --to {self.client}` sends what is missing"
            print(f"note: {told}; {again}", file=sys.stderr, flush=True)
