"""The run of a table, and the table of its finished cells: a plain value that table.json holds and other files show.

The cells go through the pipeline one after the other, in directories that share stages with equal inputs.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sftmix.cli.results import say
from sftmix.common.errors import ConfigError, LossLeapError, NonFiniteError, SFTMixError, Stopped, nearest, told
from sftmix.common.files import read_json, write_json, write_text
from sftmix.common.shown import short
from sftmix.config.read import TABLE, from_plain
from sftmix.pipeline.directory import RunDirectory
from sftmix.tools.compare.contrasts import contrast_of
from sftmix.tools.compare.plan import DIVERGED, Cell, Comparison, has_diverged, is_over, shown_options
from sftmix.tools.compare.statistics import (
    ALPHA,
    MIN_SEEDS,
    holm,
    mean_sd,
)
from sftmix.tools.runs.shown import flatten, markdown_table

SETTINGS = ("seed", "world_size", "data.max_length")
"""Numbers of a summary.json that are chosen, not measured: their means over seeds say nothing."""
SHOWN = (
    "eval_nll_after",
    "eval_nll_best",
    "eval_nll_before",
    "eval_accuracy",
    "eval_exact_match",
    "calibration",
    "mu_effective",
    "ntp_tokens",
    "mixup_tokens",
    "confidence_std",
    "confounds",
    "stages.train.wall_seconds",
)
"""Figures and groups of figures that are shown unless `metrics` names others; missing ones are left out."""
CONTRASTS = ["contrast", "seeds", "difference", "95% interval", "over", "p", "p (Holm)", "result", "inputs that differ"]
NOTES = """\
- p: two-sided sign-flip test over the seeds; Holm over all contrasts; the result is by p after Holm alone.
- 95% interval: Student's t, not corrected for several contrasts.
- Inputs that differ are those of the training, of a difference of differences within each of the two. The order of the
  examples follows from data, split, confidence, pairing, seed, epochs and batch size: where one of them differs, it is
  part of the difference. Where none differs, both are the same training."""


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run the missing cells of a table and return it in the form of table.json.

    Call it in every process of a torchrun. Every run is checked before the first starts. The same call continues an
    interrupted table, or one with more variants or seeds than before. A run that diverges has no figures, and the table
    goes on; it is not tried again. Raises the errors of `sftmix.common.errors`; an error of a run names its cell.
    """
    from sftmix.tools.runs.start import check_run, holding

    comparison.validate()
    if not comparison.out:
        raise ConfigError("out is missing: name the directory of the table, --out runs/NAME")
    cells, out = comparison.cells, Path(comparison.out)
    foreign = {file.name for file in out.glob("[!.]*")} - {"STATUS.json"}
    if foreign and not (out / TABLE).exists():
        raise ConfigError(f"{out} holds {min(foreign)}, which no table wrote; choose another --out")
    with holding(out):  # what is certain of any run without a model is refused before torch is imported
        for cell in cells:
            with _named(cell):
                check_run(from_plain(cell.plain), "train")
    from sftmix.common.world import start_world

    summaries = {}
    say_rows = cache(print)  # equal rows are printed once
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
                table = world.from_main(lambda: write_result(out, build_table(comparison, summaries)))
        directory.tell(stage="table", step=len(cells))
        return table


def _summary_of(cell: Cell, cells: list[Cell], world: Any, say_rows: Any) -> dict[str, Any]:
    """Run a cell and return its summary, an empty one if its target diverged: that is also a result.

    Nothing can be made from a reference that diverges, and other cells share it: the table ends.

    world     the ranks
    say_rows  prints the report on the rows of a run
    """
    from sftmix.pipeline.recipe import run

    name = f"{cell.variant}, seed {cell.seed}"
    say(f"\n{name} ({cells.index(cell) + 1} of {len(cells)})", sys.stdout)
    if world.from_main(lambda: has_diverged(cell.path)):
        say(f"diverged before, and is not tried again; delete {cell.path / DIVERGED} to have that", sys.stdout)
        return {}
    try:
        return run(
            from_plain(cell.plain),  # with components of its own: no cell sees the state of another
            world=world,
            pool=[other.path for other in cells],
            say_rows=say_rows,
            validated=True,
        )
    except LossLeapError:  # the loss is still a number, and a person is to look
        raise
    except NonFiniteError as error:
        if world.from_main(lambda: read_json(cell.path / "STATUS.json")["stage"]) != "train":
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
    """Return seed, cell and metrics of the finished runs of a variant."""
    runs = []
    for cell in comparison.cells:
        if cell.variant == variant and cell.name in summaries:
            numbers = flatten(summaries[cell.name])
            metrics = {name: x for name, x in numbers if name not in SETTINGS and math.isfinite(x)}
            runs.append({"seed": cell.seed, "run": cell.name, "metrics": metrics})
    return runs


def _spread(runs: Sequence[Any]) -> dict[str, Any]:
    """Return metric -> number of seeds that have it, mean and standard deviation."""
    import pandas as pd

    figures = {}
    for name, column in pd.DataFrame([run["metrics"] for run in runs]).items():
        values = column.dropna()
        mean, sd = mean_sd(values)
        figures[name] = {"seeds": len(values), "mean": mean, "sd": sd}
    return figures


def build_table(comparison: Comparison, summaries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of the finished cells; `complete` is True if these are all.

    summaries  name of a cell -> what its run returned; empty if its target diverged
    A run has as metrics every finite number of its summary but SETTINGS, nested ones with dots; `no_value` lists the
    seeds without the metric. Only a complete table has contrasts: testing a part of the seeds would be one of many
    looks.
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
    for contrast, p_holm in zip(contrasts, holm([each["p"] for each in contrasts]), strict=True):
        contrast["p_holm"] = None if contrast["p"] is None else p_holm
        contrast["verdict"] = "different" if p_holm <= ALPHA else "no difference shown"
        if (seeds := len(contrast["seeds"])) < MIN_SEEDS:
            contrast["verdict"] = f"not tested: {seeds} of at least {MIN_SEEDS} seeds"
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


# ---------------------------------------------------------------------------------------------- files


def write_result(directory: Path, table: dict[str, Any]) -> dict[str, Any]:
    """Write table.json, table.md, and cells.csv with a row for each run; return the table."""
    import pandas as pd

    write_json(directory / "table.json", table)
    write_text(directory / "table.md", markdown(table))
    rows = []
    for name, variant in table["variants"].items():
        rows += [{"variant": name, "seed": r["seed"], "run": r["run"], **r["metrics"]} for r in variant["runs"]]
    write_text(directory / "cells.csv", pd.DataFrame(rows).to_csv(index=False))
    return table


def markdown(table: Mapping[str, Any]) -> str:
    """Return table.md: the metric and further figures of each variant, the contrasts, and what they can carry."""
    variants, seeds, metric = table["variants"], len(table["options"]["seeds"]), table["metric"]
    parts = [f"# {metric}: {len(variants)} variants x {seeds} seeds"]
    if not table["complete"]:
        parts.append(f"**INCOMPLETE: {table['runs_done']} of {table['runs']} runs are done.**")
    if table["contrasts"]:
        rows = [CONTRASTS]
        for contrast in table["contrasts"]:
            interval, numbers = contrast["interval"], [contrast["p"], contrast["p_holm"]]
            rows.append(
                [
                    f"{contrast['ours']} − {contrast['theirs']}",
                    f"{len(contrast['seeds'])} of {seeds}",
                    "-" if contrast["mean"] is None else f"{contrast['mean']:+.4f}",
                    "-" if interval is None else "[{:+.4f}, {:+.4f}]".format(*interval),
                    contrast["interval_over"] or "-",
                    *("-" if number is None else short(number) for number in numbers),
                    contrast["verdict"],
                    ", ".join(contrast["inputs_that_differ"]) or "none",
                ]
            )
        parts += [markdown_table(rows), NOTES]
    for name, variant in variants.items():
        if seeds_without := ", ".join(map(str, variant["no_value"])):
            parts.append(
                f"**{name}: no finite {metric} at seeds {seeds_without}. Such runs (diverged, or not measured) are in "
                "no mean and no contrast, which flatters a variant that diverges.**"
            )
    parts += [*_figures(table), "## Variants"]
    options = [[name, shown_options(variant["options"])] for name, variant in variants.items()]
    parts.append(markdown_table([["variant", "options that are not the same in all"], *options]))
    parts.append(f"Trained by sftmix {', '.join(table['trained_by'])}.")
    return "\n\n".join(parts) + "\n"


def _figures(table: Mapping[str, Any]) -> list[str]:
    """Return the metric and further figures of each variant, with a note for each name of `metrics` that is of none."""
    variants, metric, named = table["variants"], table["metric"], table["options"]["metrics"]
    of_held_out = metric in ("eval_nll_after", "eval_nll_best", "eval_nll_before")
    unit = "nats per response token of the held-out rows; lower is better" if of_held_out else "no unit"
    parts = [f"## Figures\n\nMean ± standard deviation over seeds. {metric}: {unit}."]
    known = dict.fromkeys(name for variant in variants.values() for name in variant["metrics"])
    names = [metric]
    for group in SHOWN if named is None else named:
        found = [name for name in known if f"{name}.".startswith(f"{group}.")]
        names += found
        if named and not found:
            note = told(f"metrics: no run has {group!r}", nearest(group, known), "the names are those of summary.json")
            parts.append(f"**{note}**")
    rows = [[name, *(_figure(variant, name) for variant in variants.values())] for name in dict.fromkeys(names)]
    return [*parts, markdown_table([["figure", *variants], *rows])]


def _figure(variant: Mapping[str, Any], name: str) -> str:
    """Return mean ± sd, and the number of seeds if some lack the figure."""
    figures, runs = variant["metrics"].get(name), len(variant["runs"])
    if figures is None:
        return "-"
    spread = "" if figures["sd"] is None else f" ± {short(figures['sd'], digits=2)}"
    some = f" ({figures['seeds']} of {runs} seeds)" if figures["seeds"] < runs else ""
    return f"{short(figures['mean'], digits=5)}{spread}{some}"
