"""The run of a table: cell after cell through the pipeline, in directories that share stages with equal inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from sftmix.common.errors import ConfigError, LossLeapError, NonFiniteError, SFTMixError, Stopped
from sftmix.common.files import read_json, write_json
from sftmix.config.layers import TABLE
from sftmix.tools.compare.cells import DIVERGED, CellResult, has_diverged, is_over, refuse_unknown_metrics, result_of
from sftmix.tools.compare.plan import Cell, Comparison
from sftmix.tools.compare.table import build_table, write_tables

if TYPE_CHECKING:
    from sftmix.common.world import World
    from sftmix.pipeline.directory import RunDirectory


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run the missing cells of a table and return it in the form of table.json.

    Call it in every process of a torchrun. Every run is checked before the first starts. The same call continues an
    interrupted table, or one with more variants or seeds than before. A run that diverges has no figures, and the table
    goes on; it is not tried again. Raises the errors of `sftmix.common.errors`; an error of a run names its cell.
    """
    comparison.validate()
    _check_cells(comparison)
    from sftmix.common.world import start_world
    from sftmix.pipeline.directory import RunDirectory

    assert comparison.out is not None
    timeout = max(cell.config().training.timeout for cell in comparison.cells)
    with start_world(timeout) as world, RunDirectory(comparison.out, world) as directory:
        return _run(comparison, world, directory)


def _run(comparison: Comparison, world: World, directory: RunDirectory) -> dict[str, Any]:
    from sftmix.common.progress import progress_bar

    cells, results, say_rows = comparison.cells, list[CellResult](), cache(print)  # equal rows are told once
    begun = (directory.path / TABLE).exists()
    world.on_main(lambda: None if begun else _write_configuration(comparison, directory))
    with progress_bar("table", total=len(cells), unit="run", enabled=world.is_main) as bar:
        for done, cell in enumerate(cells):
            bar.show(cell.name)
            new = world.share(_is_new(cell, directory) if world.is_main else None)
            if new:
                directory.starts_work()
            directory.tell(stage=cell.name, step=done, total_steps=len(cells))
            results.append(_run_cell(cell, cells, world, say_rows))
            world.on_main(lambda: refuse_unknown_metrics(comparison, results))
            # The last table needs every run. A cell that was read back changes nothing; another may still be refused.
            if new and len(results) < len(cells):
                world.on_main(lambda: _write(comparison, directory, build_table(comparison, results), results))
            bar.update()
    directory.tell(stage="table", step=len(cells))
    table = world.on_main(lambda: build_table(comparison, results))
    world.on_main(lambda: _write(comparison, directory, table or {}, results))
    return world.share(table)


def _is_new(cell: Cell, directory: RunDirectory) -> bool:
    """Return True if the cell has not run yet, or if no table was written yet."""
    return not (is_over(cell.path) and (directory.path / "table.json").exists())


def _write(
    comparison: Comparison, directory: RunDirectory, table: dict[str, Any], results: Sequence[CellResult]
) -> None:
    """Write the table's files, and compare.yaml beside them: it describes what was run, never what was refused."""
    _write_configuration(comparison, directory)
    write_tables(directory.path, table, results)


def _write_configuration(comparison: Comparison, directory: RunDirectory) -> None:
    import yaml

    from sftmix.common.files import write_text

    text = yaml.safe_dump(comparison.plain(), sort_keys=False, allow_unicode=True)
    write_text(directory.path / TABLE, text)


def _run_cell(cell: Cell, cells: list[Cell], world: World, say_rows: Callable[[str], object]) -> CellResult:
    if world.is_main:
        print(f"\n{cell.variant}, seed {cell.seed} ({cells.index(cell) + 1} of {len(cells)})", flush=True)
    if world.share(world.is_main and has_diverged(cell.path)):
        if world.is_main:
            print(f"diverged before, and is not tried again; delete {cell.path / DIVERGED} to have that", flush=True)
        return result_of(cell, {})
    return result_of(cell, _summary_of(cell, cells, world, say_rows))


def _summary_of(cell: Cell, cells: list[Cell], world: World, say_rows: Callable[[str], object]) -> dict[str, Any]:
    """Run a cell and return its summary, an empty one if its training diverged: that is a result, too."""
    from sftmix.pipeline.recipe import run

    try:
        with _named(cell):
            return run(cell.config(), world=world, pool=[other.path for other in cells], say_rows=say_rows)
    except LossLeapError:  # the loss is still a number, and a person is to look
        raise
    except NonFiniteError as error:
        message = str(error)
        if not world.share(world.on_main(lambda: _note_divergence(cell, message))):
            raise
        if world.is_main:
            print(f"diverged; the table goes on. {message}", flush=True)
        return {}


def _note_divergence(cell: Cell, message: str) -> bool:
    """Note that the target of a cell diverged, and return True; False if it was another stage.

    Nothing can be made from a reference that diverges, and other cells share it.
    """
    of_target = bool(read_json(cell.path / "STATUS.json")["stage"] == "train")
    if of_target:
        write_json(cell.path / DIVERGED, {"message": message})
    return of_target


@contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Let errors name the cell."""
    try:
        yield
    except (SFTMixError, Stopped) as error:
        error.args = (f"variant {cell.variant}, seed {cell.seed}: {error}",)
        raise


def _check_cells(comparison: Comparison) -> None:
    """Refuse, before torch is imported and a run is read back, what is certain of any run without a model."""
    from sftmix.pipeline.start import check_run, holding

    cells = comparison.cells
    _refuse_foreign(comparison)
    with holding(comparison.out or ""):
        for cell in cells:
            with _named(cell):
                check_run(cell.config(), "train", pool=[other.path for other in cells])


def _refuse_foreign(comparison: Comparison) -> None:
    """Raise ConfigError if the directory holds something that no table wrote."""
    from pathlib import Path

    out = Path(comparison.out or "")
    if out.is_dir() and not (out / TABLE).exists():
        foreign = sorted(p.name for p in out.iterdir() if p.name not in (".lock", "STATUS.json"))
        if foreign:
            raise ConfigError(f"{out} holds {foreign[0]}, which no table wrote; choose another --out")
