"""RunContext, which every stage of a run receives: configuration, ranks and run directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.common.files import write_text
from sftmix.common.names import is_there
from sftmix.common.world import World
from sftmix.config import RunConfig
from sftmix.config.layers import read_yaml
from sftmix.data.sources import may_be_of_the_hub
from sftmix.options import as_list
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.identity import Known
from sftmix.pipeline.rows import RunRows
from sftmix.training.log import PeakMemory, StopAtOnce
from sftmix.training.loop import Stage, StageResult, train


class RunContext:
    """One run in progress. A stage begins; if it is not done, it is made and finished; then its files are read."""

    def __init__(self, config: RunConfig, world: World, directory: RunDirectory, stop: StopAtOnce) -> None:
        self.config, self.world, self.directory, self._stop = config, world, directory, stop
        self.pairing = config.resolved_pairing()
        self.memory = PeakMemory(world.device)
        """The peak of the stage that was begun last."""
        self._began = time.time()

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def known(self, rows: RunRows | None) -> Known:
        """Return what the inputs of a stage are made of, once the stages before it are done."""
        return Known(self.config, self.world, rows, self.directory.path)

    def begin(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Enter a stage; return True if it is done. config.yaml is written after the inputs are accepted: a new one for
        a stage that is to be made; else it is told where model and rows are now.

        Raises Stopped if the stage before swallowed a signal.
        """
        self._stop.check(self.world)
        done = self.directory.begin(stage, inputs)
        self.memory, self._began = PeakMemory(self.world.device), time.time()
        file = self.directory.path / "config.yaml"
        self.world.on_main(lambda: self._correct(file) if done and file.exists() else self._write(file))
        return done

    def _write(self, file: Path) -> None:
        write_text(file, self.config.yaml())

    def _correct(self, file: Path) -> None:
        """Put the paths of model and rows into config.yaml where those there are gone: by content they are the same.

        What may be an id of the hub stays.
        """
        import yaml

        there, now = read_yaml(file), self.config.plain()
        moved = [
            (group, key)
            for group, key in (("model", "path"), ("data", "train"), ("data", "eval"))
            if key in there.get(group, {})
            and there[group][key] != now[group][key]
            and not all(is_there(name) or may_be_of_the_hub(name) for name in as_list(there[group][key]) if name)
        ]
        for group, key in moved:
            there[group][key] = now[group][key]
        if moved:
            write_text(file, yaml.safe_dump(there, sort_keys=False, allow_unicode=True))

    def train(self, stage: Stage) -> StageResult:
        """Train a stage to its end, from its newest valid checkpoint on."""
        return train(stage, self.world)

    def seconds(self) -> float:
        """Return the seconds since the stage began."""
        return time.time() - self._began

    def finish(self, stage: str, outputs: Sequence[str], figures: Mapping[str, Any]) -> None:
        """Finish a stage: record its files, its figures, and the peak memory over all ranks."""
        peak = self.world.max(self.memory.bytes())
        self.directory.finish(stage, list(outputs), {**figures, "peak_memory_bytes": peak})
