"""The run of a table: cell after cell through the pipeline, in directories that share stages with equal inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sftmix.common.errors import ConfigError, LossLeapError, NonFiniteError, SFTMixError, Stopped
from sftmix.common.files import read_json, write_json, write_text
from sftmix.config.read import TABLE
from sftmix.tools.compare.plan import DIVERGED, Cell, Comparison, has_diverged, is_over
from sftmix.tools.compare.table import build_table, write_table

if TYPE_CHECKING:
    from sftmix.common.world import World


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run the missing cells of a table and return it in the form of table.json.

    Call it in every process of a torchrun. Every run is checked before the first starts. The same call continues an
    interrupted table, or one with more variants or seeds than before. A run that diverges has no figures, and the table
    goes on; it is not tried again. Raises the errors of `sftmix.common.errors`; an error of a run names its cell.
    """
    comparison.validate()
    cells, out = comparison.cells, Path(comparison.out or "")
    _check(comparison, out)
    from sftmix.common.world import start_world
    from sftmix.pipeline.directory import RunDirectory

    summaries, say_rows = dict[str, Any](), cache(print)  # equal rows are told once
    timeout = max(config.training.timeout for config in comparison.variants.values())
    with start_world(timeout) as world, RunDirectory(out, world) as directory:
        plan = yaml.safe_dump(comparison.plain(), sort_keys=False, allow_unicode=True)
        world.on_main(lambda: write_text(out / TABLE, plan))
        for done, cell in enumerate(cells):
            new = world.share(world.is_main and not is_over(cell.path))
            if new:
                directory.starts_work()
            directory.tell(stage=cell.name, step=done, total_steps=len(cells))
            with _named(cell):
                summaries[cell.name] = _summary_of(cell, cells, world, say_rows)
            # The last table needs every run. A cell that was read back changes nothing; another may still be refused.
            if new or len(summaries) == len(cells):
                table = world.on_main(lambda: write_table(out, build_table(comparison, summaries)))
        directory.tell(stage="table", step=len(cells))
        return world.share(table)


def _summary_of(cell: Cell, cells: list[Cell], world: World, say_rows: Callable[[str], object]) -> dict[str, Any]:
    """Run a cell and return its summary, an empty one if its target diverged: that is a result, too.

    Nothing can be made from a reference that diverges, and other cells share it: the table ends.
    """
    from sftmix.pipeline.recipe import run

    tell = print if world.is_main else lambda *_, **options: None
    tell(f"\n{cell.variant}, seed {cell.seed} ({cells.index(cell) + 1} of {len(cells)})", flush=True)
    if world.share(world.is_main and has_diverged(cell.path)):
        tell(f"diverged before, and is not tried again; delete {cell.path / DIVERGED} to have that", flush=True)
        return {}
    try:
        pool = [other.path for other in cells]
        return run(cell.config(), world=world, pool=pool, say_rows=say_rows, validated=True)
    except LossLeapError:  # the loss is still a number, and a person is to look
        raise
    except NonFiniteError as error:
        message = {"message": str(error)}
        if not world.share(world.is_main and read_json(cell.path / "STATUS.json")["stage"] == "train"):
            raise
        world.on_main(lambda: write_json(cell.path / DIVERGED, message))
        tell(f"diverged; the table goes on. variant {cell.variant}, seed {cell.seed}: {error}", flush=True)
        return {}


@contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Let errors name the cell."""
    try:
        yield
    except (SFTMixError, Stopped) as error:
        error.args = (f"variant {cell.variant}, seed {cell.seed}: {error}",)
        raise


def _check(comparison: Comparison, out: Path) -> None:
    """Refuse, before torch is imported and a run is read back, what is certain of any run without a model."""
    from sftmix.pipeline.start import check_run, holding

    if out.is_dir() and not (out / TABLE).exists():
        foreign = sorted(p.name for p in out.iterdir() if p.name not in (".lock", "STATUS.json"))
        if foreign:
            raise ConfigError(f"{out} holds {foreign[0]}, which no table wrote; choose another --out")
    with holding(out):
        for cell in comparison.cells:
            with _named(cell):
                check_run(cell.config(), "train")
