"""The files of a table: table.json, table.md and table.tex for people, cells.csv with a row for each run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.common.errors import nearest, told
from sftmix.common.files import write_json, write_text
from sftmix.common.shown import short
from sftmix.tools.compare.plan import shown_options
from sftmix.tools.runs.shown import markdown_table

SHOWN = (
    "eval_nll_after",
    "eval_nll_best",
    "eval_nll_before",
    "eval_accuracy",
    "eval_exact_match",
    "calibration.ece",
    "mu_effective",
    "stages.train.wall_seconds",
)
"""Figures that are shown unless `metrics` names others; missing ones are left out, and cells.csv has all."""
CONTRASTS = ["contrast", "seeds", "difference", "95% interval", "over", "p", "p (Holm)", "result", "inputs that differ"]
NOTES = """\
- p: two-sided sign-flip test over the seeds; Holm over all contrasts; the result is by p after Holm alone.
- 95% interval: Student's t, not corrected for several contrasts.
- Inputs that differ are options, and what the training was made from; of a difference of differences, within each of
  the two. The order of the examples follows from data, split, confidence, pairing, online, seed, epochs and batch size:
  where one of them differs, it is part of the difference, and so is how often a run was evaluated for its best one."""


def write_result(directory: Path, table: dict[str, Any]) -> dict[str, Any]:
    """Write table.json, table.md, table.tex, and cells.csv with a row for each run; return the table."""
    import pandas as pd

    write_json(directory / "table.json", table)
    write_text(directory / "table.md", markdown(table))
    write_text(directory / "table.tex", latex(table))
    rows = []
    for name, variant in table["variants"].items():
        rows += [{"variant": name, "seed": r["seed"], "run": r["run"], **r["metrics"]} for r in variant["runs"]]
    write_text(directory / "cells.csv", pd.DataFrame(rows).to_csv(index=False))
    return table


def contrast_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Return the contrasts as a table of text, its heading first."""
    seeds = len(table["options"]["seeds"])
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
    return rows


def markdown(table: Mapping[str, Any]) -> str:
    """Return table.md: the metric and further figures of each variant, the contrasts, and what they can carry."""
    variants, seeds, metric = table["variants"], len(table["options"]["seeds"]), table["metric"]
    parts = [f"# {metric}: {len(variants)} variants x {seeds} seeds"]
    if not table["complete"]:
        parts.append(f"**INCOMPLETE: {table['runs_done']} of {table['runs']} runs are done.**")
    if table["contrasts"]:
        parts += [markdown_table(contrast_rows(table)), NOTES]
    for name, variant in variants.items():
        if seeds_without := ", ".join(map(str, variant["no_value"])):
            parts.append(
                f"**{name}: no finite {metric} at seeds {seeds_without}. Such runs (diverged, or not measured) are in "
                "no mean and no contrast, which flatters a variant that diverges.**"
            )
        if others := ", ".join(run["trained_in"] for run in variant["runs"] if run["trained_in"] != run["run"]):
            parts.append(
                f"**{name}: nothing that decides its weights differs from {others}, so that was not trained again: "
                "evaluations, seconds and memory are of that run.**"
            )
    parts += [*_figures(table), f"## {metric} by seed", markdown_table(rows_by_seed(table)), "## Variants"]
    options = [[name, shown_options(variant["options"])] for name, variant in variants.items()]
    parts.append(markdown_table([["variant", "options that are not the same in all"], *options]))
    parts.append(f"Trained by sftmix {', '.join(table['trained_by'])}.")
    return "\n\n".join(parts) + "\n"


def _figures(table: Mapping[str, Any]) -> list[str]:
    """Return the metric and further figures of each variant, with a note for each name of `metrics` that is of none."""
    metric, named = table["metric"], table["options"]["metrics"]
    of_held_out = metric in ("eval_nll_after", "eval_nll_best", "eval_nll_before")
    unit = "nats per response token of the held-out rows; lower is better" if of_held_out else "no unit"
    parts = [f"## Figures\n\nMean ± standard deviation over seeds. {metric}: {unit}."]
    known = _known(table)
    for group in named or ():
        if not _of_group(group, known):
            note = told(f"metrics: no run has {group!r}", nearest(group, known), "the names are those of summary.json")
            parts.append(f"**{note}**")
    return [*parts, markdown_table(figure_rows(table))]


def figure_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Return the metric and further figures of each variant as a table of text, its heading first."""
    named, known = table["options"]["metrics"], _known(table)
    names = [table["metric"]]
    for group in SHOWN if named is None else named:
        names += _of_group(group, known)
    variants = table["variants"]
    rows = [[name, *(_figure(variant, name) for variant in variants.values())] for name in dict.fromkeys(names)]
    return [["figure", *variants], *rows]


def _known(table: Mapping[str, Any]) -> list[str]:
    """Return the names of all figures that some run has."""
    return list(dict.fromkeys(name for variant in table["variants"].values() for name in variant["metrics"]))


def _of_group(group: str, known: Sequence[str]) -> list[str]:
    """Return the figures of a group (calibration), or the one of this name."""
    return [name for name in known if f"{name}.".startswith(f"{group}.")]


def rows_by_seed(table: Mapping[str, Any]) -> list[list[str]]:
    """Return the metric of each run as a table of text: a row for each seed, a column for each variant."""
    variants, metric = table["variants"], table["metric"]
    rows = [["seed", *variants]]
    for seed in table["options"]["seeds"]:
        cells = []
        for variant in variants.values():
            found = [run["metrics"].get(metric) for run in variant["runs"] if run["seed"] == seed]
            cells.append("-" if found in ([], [None]) else f"{found[0]:.4f}")
        rows.append([str(seed), *cells])
    return rows


def latex(table: Mapping[str, Any]) -> str:
    """Return the figures of each variant as a LaTeX table of booktabs, a row for each variant."""
    import pandas as pd

    variants = table["variants"]
    names = [name for name in dict.fromkeys([table["metric"], *SHOWN]) if name in _known(table)]
    cells = [[_figure(variant, name).replace("±", r"$\pm$") for name in names] for variant in variants.values()]
    rows = pd.DataFrame(cells, index=[_escaped(name) for name in variants], columns=[_escaped(name) for name in names])
    return str(rows.to_latex(column_format="l" + "r" * len(names)))


def _escaped(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


def _figure(variant: Mapping[str, Any], name: str) -> str:
    """Return mean ± sd, and the number of seeds if some lack the figure."""
    figures, runs = variant["metrics"].get(name), len(variant["runs"])
    if figures is None:
        return "-"
    spread = "" if figures["sd"] is None else f" ± {short(figures['sd'], digits=2)}"
    some = f" ({figures['seeds']} of {runs} seeds)" if figures["seeds"] < runs else ""
    return f"{short(figures['mean'], digits=5)}{spread}{some}"
