"""The run directory, in which stages are begun and finished.

If several runs are beside each other, a stage that a sibling has finished from the same inputs is adopted instead of
being made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sftmix.disk.files import (
    MANIFEST,
    placing,
    read_json,
    remove_leftovers,
    write_json,
    write_manifest,
)
from sftmix.disk.places import PathLike
from sftmix.disk.regular import regular
from sftmix.pipeline.lock import Hold
from sftmix.pipeline.signature import write_start
from sftmix.pipeline.validity import (
    ADOPTED,
    Inputs,
    differences,
    is_finished,
    origin,
    refuse_stage,
)

if TYPE_CHECKING:
    from sftmix.ranks.world import World


class RunDirectory(Hold):
    """`with RunDirectory(path, world) as run:` holds the lock and keeps STATUS.json up to date (rank 0 writes).

    A stage is made between `begin`, which says whether there is anything to do, and `finish`. Every rank calls each of
    these; rank 0 reads and writes.

    pool  sibling run directories whose finished stages are adopted if their inputs are the same
    """

    def __init__(self, path: PathLike, world: World, *, pool: Sequence[Path] = ()) -> None:
        super().__init__(path)
        self.world, self.pool, self._main = world, pool, world.is_main

    def __enter__(self) -> Self:
        self.world.on_main(super().__enter__)
        return self

    def __exit__(self, *raised: Any) -> None:
        error = raised[1] and self.world.explained(raised[1])  # None, or the other rank's error that caused this one
        if error is None:  # the command did all it should
            unfinished = [file for file in self.path.glob("*/inputs.json") if not file.with_name(MANIFEST).exists()]
            # An earlier process failed, or was killed, behind its last stage; all were read back now, so it ended well.
            if self._earlier.get("exit_code") != 0 and not unfinished:
                self.starts_work()
            self.status(exit_code=0, message="")
        super().__exit__(type(error), error, None)
        if error is not raised[1]:
            raise error from raised[1]

    def tell(self, **fields: Any) -> None:
        """Update STATUS.json from every rank: a full disk ends them all."""
        self.world.on_main(lambda: self.status(**fields))

    def begin(self, stage: str, inputs: Inputs, configuration: str = "", *, words: Mapping[str, str] = {}) -> bool:
        """Enter a stage made from `inputs`; True if it is already done and valid, here or in the pool.

        It is taken over from the first run of the pool that finished it from the same inputs. Its outputs are hard
        links if the file system has them: nothing here rewrites a file in place. Raises ConfigError naming what
        differs if the stage was made, or begun, from other inputs, and DifferenceError if an output was changed.

        configuration  of the run, which config.yaml holds from the first stage on that is not done here
        words          what the error says of inputs that are hashes, as `StageSpec.words`
        """
        directory = self.path / stage

        def enter() -> bool:
            refuse_stage(directory, inputs, words)  # before anything is written
            if is_finished(directory):
                return True
            self.starts_work()
            remove_leftovers(directory)
            here = os.getcwd()
            relative = os.path.relpath(here, self.path.resolve())  # of a run that is moved with its data
            write_start(self.path, {"directory": here, "relative": relative}, configuration)
            written = directory / "inputs.json"
            if not written.exists() or differences(read_json(written), inputs):  # the checkpoints know its hash
                write_json(written, inputs)
            self.status(stage=stage, step=0, total_steps=0, doing="")
            for source in (sibling / stage for sibling in self.pool):
                equal = (source / MANIFEST).exists() and not differences(read_json(source / "inputs.json"), inputs)
                if equal and is_finished(source):  # which reads all of its files
                    for name in read_json(source / MANIFEST, files=dict)["files"]:
                        _link(source / name, directory / name)  # also ../confidence/dynamics.parquet, of the reference
                    write_json(directory / ADOPTED, {"from": os.path.relpath(origin(source), directory)})
                    _link(source / MANIFEST, directory / MANIFEST)  # last: what was interrupted before is done again
                    return True
            return False

        return self.world.from_main(enter)

    def finish(self, stage: str, outputs: Sequence[str], figures: Mapping[str, Any]) -> None:
        """Mark a stage as done: figures.json, and the manifest with the hashes of `outputs`, last."""
        directory = self.path / stage

        def record() -> None:
            write_json(directory / "figures.json", figures)
            write_manifest(directory, [*outputs, "figures.json"])

        self.world.on_main(record)


def _link(source: Path, target: Path) -> None:
    """Link a file to `target` in one step, or copy it if the file system has no links."""
    with placing(target) as staging:
        try:
            os.link(regular(source), staging)
        except OSError:  # another file system, or one without links
            shutil.copy2(source, staging)
