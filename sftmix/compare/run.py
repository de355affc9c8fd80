"""Running a table: cell after cell through the pipeline, in directories that share what is made from equal inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sftmix.compare.plan import CONFIGURATION, Cell, Comparison
from sftmix.compare.results import CellResult, build_table, refuse_unknown_metrics, result_of, write_tables
from sftmix.errors import ConfigError, SFTMixError

if TYPE_CHECKING:
    from sftmix.rundir import RunDirectory
    from sftmix.training.distributed import World


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run what is missing of a table and return it as table.json holds it.

    Call it in every process of a torchrun. Every run is checked before the first starts; the same call continues a
    table that was interrupted, and one that has got more variants or seeds. Raises the errors of `sftmix.errors`;
    those of a run name its cell.
    """
    comparison.validate()
    from sftmix.rundir import RunDirectory
    from sftmix.training.distributed import start_world

    assert comparison.out is not None
    with start_world() as world:
        world.on_main(lambda: _refuse_foreign(comparison))
        with RunDirectory(comparison.out, world) as directory:
            return _run(comparison, world, directory)


def _run(comparison: Comparison, world: World, directory: RunDirectory) -> dict[str, Any]:
    from sftmix.artefacts import write_text
    from sftmix.training.log import progress_bar

    cells, results = comparison.cells, list[CellResult]()
    if world.is_main:
        write_text(directory.path / CONFIGURATION, _yaml(comparison))
    with progress_bar("table", total=len(cells), unit="run", enabled=world.is_main) as bar:
        for done, cell in enumerate(cells):
            bar.set_postfix_str(cell.name)
            directory.status(stage=cell.name, step=done, total_steps=len(cells))
            results.append(_run_cell(cell, cells, world))
            if len(results) <= len(comparison.variants):
                world.on_main(lambda: refuse_unknown_metrics(comparison, results))
            if len(results) < len(cells):  # the last word needs every run
                world.on_main(lambda: write_tables(directory.path, build_table(comparison, results), results))
            bar.update()
    directory.status(stage="table", step=len(cells))
    table = world.on_main(lambda: build_table(comparison, results))
    world.on_main(lambda: write_tables(directory.path, table or {}, results))
    return world.share(table)


def _run_cell(cell: Cell, cells: list[Cell], world: World) -> CellResult:
    from sftmix import pipeline

    if world.is_main:
        print(f"\n{cell.variant}, seed {cell.seed} ({cells.index(cell) + 1} of {len(cells)})", flush=True)
    try:
        summary = pipeline.run(cell.config(), world=world, pool=[other.path for other in cells])
    except SFTMixError as error:
        error.args = (f"variant {cell.variant}, seed {cell.seed}: {error}",)
        raise
    return result_of(cell, summary)


def _refuse_foreign(comparison: Comparison) -> None:
    """ConfigError where the directory holds something that no table wrote."""
    from pathlib import Path

    out = Path(comparison.out or "")
    if out.is_dir() and not (out / CONFIGURATION).exists():
        foreign = sorted(p.name for p in out.iterdir() if p.name not in (".lock", "STATUS.json"))
        if foreign:
            raise ConfigError(f"{out} holds {foreign[0]}, which no table wrote; choose another --out")


def _yaml(comparison: Comparison) -> str:
    import yaml

    return yaml.safe_dump(comparison.plain(), sort_keys=False, allow_unicode=True)
