"""The rows of a run: the lines of metrics.jsonl of all its stages, in the order in which they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.files import read_object

STAGES = ("reference", "train", "baseline")
"""The stages with a metrics.jsonl, in their order in a run."""


@dataclass(frozen=True, slots=True)
class Row:
    """One optimizer step of a stage.

    number  place among all rows of the run, from 0
    step    of the stage, from 1
    time    seconds since the epoch when the step ended
    values  STAGE/metric -> finite number
    """

    number: int
    stage: str
    step: int
    time: float
    values: Mapping[str, float]


class Rows:
    """The rows of a run directory as they come: `new` reads what was written since it was read last.

    A resumed training writes the steps after its checkpoint anew, with the same values. They keep their numbers, so a
    tracker that has seen them already does not take them twice.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._read = dict.fromkeys(STAGES, 0)
        self.count = 0
        """Rows read so far."""

    def new(self) -> Iterator[Row]:
        """Yield the rows that were not read yet; a line that is still being written is left for the next time."""
        for stage in STAGES:
            path = self._run / stage / "metrics.jsonl"
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self._read[stage])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._read[stage] += len(line)
                    step = read_object(line, f"{path}, up to byte {self._read[stage]:,}", step=int, time=float)
                    yield _row(self.count, stage, step)
                    self.count += 1


def _row(number: int, stage: str, line: Mapping[str, Any]) -> Row:
    apart = ("step", "time", "rows")  # a hash is nothing to plot
    kept = {k: v for k, v in line.items() if k not in apart and v is not None}  # null: not finite
    return Row(number, stage, line["step"], line["time"], {f"{stage}/{k}": v for k, v in kept.items()})
