"""The run of a table, and the table of its finished cells: a plain value that table.json holds and other files show.

The cells go through the pipeline one after the other, in directories that share stages with equal inputs.
"""

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sftmix.cli.say import say
from sftmix.config.read import from_dict, read_yaml
from sftmix.disk.files import STARTED, TABLE, read_json, write_json, write_text
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.start import is_ours
from sftmix.pipeline.validity import origin
from sftmix.tools.compare.contrasts import contrast_of, unrecorded
from sftmix.tools.compare.plan import DIVERGED, Cell, Comparison, has_diverged, is_over
from sftmix.tools.compare.statistics import (
    ALPHA,
    holm,
    mean_sd,
    seeds_needed,
)
from sftmix.tools.compare.written import Table, write_result
from sftmix.tools.runs.output import flatten
from sftmix.tools.runs.results import fit_of
from sftmix.words.errors import ConfigError, LossLeapError, NonFiniteError, SFTMixError, Stopped

SETTINGS = ("seed", "world_size", "data.max_length")
"""Numbers of a summary.json that are chosen, not measured: their means over seeds say nothing."""


def compare(comparison: Comparison) -> Table:
    """Run the missing cells of a table and return it in the form of table.json.

    Call it in every process of a torchrun. Before the first run, each variant is checked as at the start of a run. The
    same call continues an interrupted table, or one with more variants or seeds than before. A run that diverges has no
    figures, and the table goes on; it is not tried again. Raises the errors of `sftmix.words.errors`; an error of a run
    names its cell.
    """
    from sftmix.tools.runs.start import holding

    comparison.validate()
    if not comparison.out:
        raise ConfigError("out is missing: name the directory of the table, --out runs/NAME")
    cells, out = comparison.cells, Path(comparison.out)
    status = is_ours(out / "STATUS.json")
    # compare.yaml alone may be somebody's own file: STATUS.json or runs beside it make it a table's.
    foreign = {file.name for file in out.glob("[!.]*")} - ({"STATUS.json"} if status else set())
    if foreign and not ((out / TABLE).exists() and (status or any(out.glob(f"*/*/{STARTED}")))):
        raise ConfigError(f"{out} holds {min(foreign)}, which no table wrote; choose another --out")
    _check_names(cells[: len(comparison.variants)], out)
    with holding(out):  # what is certain of any run without a model is refused before torch is imported
        _refuse_changed(cells, out)
    from sftmix.ranks.world import start_world
    from sftmix.training.signals import StopSignal

    summaries = {}
    say_rows = cache(print)  # equal rows are printed once
    # One process group serves all cells.
    timeout = max(config.training.timeout for config in comparison.variants.values())
    with start_world(timeout) as world, StopSignal("later"), RunDirectory(out, world) as directory:
        _check_starts(cells[: len(comparison.variants)], world)  # each variant, at the first seed
        plan = yaml.safe_dump(comparison.as_dict(), sort_keys=False, allow_unicode=True)
        world.on_main(lambda: write_text(out / TABLE, plan))
        for done, cell in enumerate(cells):
            new = world.share(world.is_main and not is_over(cell.path))  # rank 0 alone looks
            if new:
                directory.starts_work()
            directory.tell(stage=cell.name, step=done, total_steps=len(cells))
            with _named(cell):
                summaries[cell.name] = _summary_of(cell, cells, world, say_rows)
            # The last table needs every run. A cell that was read back changes nothing; another may still be refused.
            if new or len(summaries) == len(cells):
                table = world.from_main(lambda: write_result(out, build_table(comparison, summaries)))
        directory.tell(stage="table", step=len(cells))
        return table


def _check_names(cells: Sequence[Cell], out: Path) -> None:
    """Raise an error if rows or models are not there, before there is a directory `out`."""
    from sftmix.tools.runs.start import check_names_given, reported_once

    for cell in () if out.exists() else cells:
        with reported_once(), _named(cell):
            check_names_given(from_dict(cell.plain))


def _refuse_changed(cells: Sequence[Cell], out: Path) -> None:
    """Raise the errors that are certain of the cells; of runs made with other inputs, one for each variant."""
    from sftmix.tools.runs.start import check_run

    refused: dict[str, str] = {}
    for cell in cells:
        if is_over(cell.path) and (others := unrecorded(read_yaml(cell.path / "config.yaml"), cell.plain)):
            say(f"note: {cell.name} is done, and its figures are of other {', '.join(sorted(others))}")
        try:
            with _named(cell):
                check_run(from_dict(cell.plain), "train")
        except ConfigError as error:
            refused.setdefault(cell.variant, str(error))
    if made := [str(out / variant) for variant in refused if (out / variant).exists()]:
        refused["remedy"] = f"To make the runs of these variants anew, move {', '.join(made)} away: the others stay."
    if refused:
        raise ConfigError("\n".join(refused.values()))


def _check_starts(cells: Sequence[Cell], world: Any) -> None:
    """Raise what ends a run at its start, by its rows and its model's config.json; the rows are in the cache then."""
    from sftmix.pipeline.recipe import check_target, read_rows

    for cell in cells:
        with _named(cell):
            check_target(*read_rows(from_dict(cell.plain), world, run=cell.path), world)


def _summary_of(cell: Cell, cells: list[Cell], world: Any, say_rows: Any) -> dict[str, Any]:
    """Run a cell and return its summary, an empty one if its target diverged: that is also a result.

    Nothing can be made from a reference that diverges, and other cells share it: the table ends.

    world     the ranks
    say_rows  prints the report on the rows of a run
    """
    from sftmix.pipeline.recipe import run

    name = f"{cell.variant}, seed {cell.seed}"
    say(f"\n{name} ({cells.index(cell) + 1} of {len(cells)})", sys.stdout)
    # Rank 0 alone reads how the run ended: a rank that went another way would wait for ever.
    if world.from_main(lambda: has_diverged(cell.path)):
        say(f"diverged before, and is not tried again; delete {cell.path / DIVERGED} to have that", sys.stdout)
        return {}
    try:
        return run(
            from_dict(cell.plain),  # with components of its own: no cell sees the state of another
            world=world,
            pool=[other.path for other in cells],
            say_rows=say_rows,
        )
    except LossLeapError:  # the loss is still a number, and a person is to look
        raise
    except NonFiniteError as error:
        if world.from_main(lambda: read_json(cell.path / "STATUS.json")["stage"]) != "train":  # a reference
            raise
        message = {"message": str(error)}
        world.on_main(lambda: write_json(cell.path / DIVERGED, message))
        say(f"diverged; the table goes on. variant {name}: {error}", sys.stdout)
        return {}


@contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Let errors name the cell."""
    try:
        yield
    except (SFTMixError, Stopped) as error:
        error.args = (f"variant {cell.variant}, seed {cell.seed}: {error}",)
        raise


# ---------------------------------------------------------------------------------------------- the value


def _runs_of(comparison: Comparison, variant: str, summaries: Mapping[str, Any]) -> list[Any]:
    """Return seed, cell, the cell that was trained for it and metrics of the finished runs of a variant."""
    runs = []
    for cell in comparison.cells:
        if cell.variant == variant and cell.name in summaries:
            numbers = [*flatten(summary), *fit_of(cell.path)] if (summary := summaries[cell.name]) else []
            metrics = {name: x for name, x in numbers if name not in SETTINGS and math.isfinite(x)}
            # A variant that differs in nothing which decides its weights took another cell's train.
            made_in = origin(cell.path / "train").parent
            trained = os.path.relpath(made_in, comparison.out)  # NTP/seed-1
            runs.append({"seed": cell.seed, "run": cell.name, "trained_in": trained, "metrics": metrics})
    return runs


def _spread(runs: Sequence[Any]) -> dict[str, Any]:
    """Return metric -> number of seeds that have it, mean and standard deviation."""
    import pandas as pd

    figures = {}
    for name, column in pd.DataFrame([run["metrics"] for run in runs]).items():
        values = column.dropna()  # runs that lack the figure, as those of a variant without Mixup
        mean, sd = mean_sd(values)
        figures[name] = {"seeds": len(values), "mean": mean, "sd": sd}
    return figures


def build_table(comparison: Comparison, summaries: Mapping[str, Any]) -> Table:
    """Return the table of the finished cells; `complete` is True if these are all.

    summaries  name of a cell -> what its run returned; empty if its target diverged
    A run has as metrics every finite number of its summary but SETTINGS, nested ones with dots, and `fit`; `no_value`
    lists the seeds without the metric. Only a complete table has contrasts: testing a part of the seeds would be one of
    many looks.
    """
    metric = comparison.options.metric
    complete = len(summaries) == len(comparison.cells)
    variants = {}
    for variant in comparison.variants:
        runs = _runs_of(comparison, variant, summaries)
        variants[variant] = {
            "options": comparison.options_of(variant),
            "metrics": _spread(runs),
            "no_value": [run["seed"] for run in runs if metric not in run["metrics"]],
            "runs": runs,
        }
    contrasts = [contrast_of(comparison, variants, arms) for arms in comparison.contrasts if complete]
    # Holm counts all planned contrasts: one that could not be measured makes the others no more significant.
    corrected = holm([each["p"] for each in contrasts])
    for contrast, p_holm in zip(contrasts, corrected, strict=True):
        contrast["p_holm"] = None if contrast["p"] is None else p_holm
        seeds = len(contrast["seeds"])
        if p_holm <= ALPHA:
            contrast["verdict"] = "different"
        # Holm multiplies the smallest p that it does not reject by the number of those.
        elif seeds < (needed := seeds_needed(sum(not p <= ALPHA for p in corrected))):  # NaN: not rejected
            contrast["verdict"] = f"not tested: {seeds} of at least {needed} seeds"
        else:
            contrast["verdict"] = "no difference shown"
    # "0.1.0 5b71cfb5a1b2"; of a run that diverged "".
    makers = {f"{one.get('version', '')} {one.get('git_revision') or ''}".strip() for one in summaries.values()}
    return {
        "complete": complete,
        "runs_done": len(summaries),
        "runs": len(comparison.cells),
        "metric": metric,
        "baseline": comparison.baseline,
        "variants": variants,
        "contrasts": contrasts,
        "options": asdict(comparison.options),
        "seed": comparison.variants[comparison.baseline].seed,
        "trained_by": sorted(makers - {""}),
    }
