"""The files of a table: table.json, and table.md and table.tex for people."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sftmix.disk.files import remove_leftovers, write_json, write_text
from sftmix.tools.compare.plan import shown_options
from sftmix.tools.runs.output import markdown_table, narrow_tables, rendered
from sftmix.words.errors import nearest, with_suggestion
from sftmix.words.shown import short

Table = dict[str, Any]
"""What table.json holds: see `build_table`."""
SHOWN = (
    "eval_nll_after",
    "eval_nll_best",
    "eval_nll_before",
    "calibration.nll_temperature_scaled",
    "fit",
    "eval_accuracy",
    "eval_exact_match",
    "calibration.ece",
    "mu_effective",
    "stages.train.wall_seconds",
)
"""Figures that are shown unless `metrics` names others; missing ones are left out, and table.json has all."""
ROUNDING = 1e-14
"""Least share of the mean that a standard deviation is of: with less, the values are equal but for rounding."""
EQUAL = 1e-12
"""Least standard deviation of a metric, or of its differences, that is more than rounding."""
CONTRASTS = ["contrast", "seeds", "difference", "95% interval", "over", "p", "p (Holm)", "result", "inputs that differ"]


def write_result(directory: Path, table: Table) -> Table:
    """Write table.json, table.md and table.tex; return the table."""
    remove_leftovers(directory, "table")  # of a command that was killed
    write_json(directory / "table.json", table)
    write_text(directory / "table.md", markdown(table))
    write_text(directory / "table.tex", latex(table))
    return table


def contrast_rows(table: Table) -> list[list[str]]:
    """Return the contrasts as a table of text, its heading first."""
    seeds = len(table["options"]["seeds"])
    rows = [
        [
            f"{contrast['ours']} − {contrast['theirs']}",
            f"{len(contrast['seeds'])} of {seeds}",
            _or_dash(contrast["mean"], "{:+.{}f}", decimals),
            _or_dash(contrast["interval"], "[{0[0]:+.{1}f}, {0[1]:+.{1}f}]", decimals),
            contrast["interval_over"] or "-",
            *(_or_dash(contrast[name], "{:.4g}") for name in ("p", "p_holm")),
            contrast["verdict"],
            ", ".join(contrast["inputs_that_differ"]) or "none",
        ]
        for contrast in table["contrasts"]
        for decimals in [_decimals(contrast["sd"] or contrast["mean"] or 0)]
    ]
    return [CONTRASTS, *rows]


def notes(table: Table) -> dict[str, list[str]]:
    """Return sentences of what a table cannot carry: of its `runs`, of its `contrasts`, and of its `figures`."""
    known = _known(table)
    unknown = [
        with_suggestion(
            f"metrics: no run has {group!r}", nearest(group, known), "the names are fit and those of summary.json"
        )
        for group in table["options"]["metrics"] or ()
        if not _of_group(group, known)
    ]
    said = partial(rendered, "compare/notes.txt", table=table, unknown=unknown)
    return {part: said(part=part).splitlines() for part in ("runs", "contrasts", "figures")}


def markdown(table: Table, columns: int | None = None) -> str:
    """Return table.md, as the file of this room says: the contrasts, figures, variants, and what they can carry.

    columns  of a terminal, for which wide tables are in parts; None: as in the file
    """
    options = [[name, shown_options(variant["options"])] for name, variant in table["variants"].items()]
    tables = markdown_table if columns is None else partial(narrow_tables, columns=columns)
    listed = "\n".join(f"- {name}: {text}" for name, text in options)
    return rendered(
        "compare/table.md",
        table=table,
        contrasts=tables(contrast_rows(table)),
        figures=tables(figure_rows(table)),
        by_seed=tables(rows_by_seed(table)),
        options=listed if columns else tables([["variant", "options that are not the same in all"], *options]),
        notes=notes(table),
    )


def figure_rows(table: Table) -> list[list[str]]:
    """Return the metric and further figures of each variant as a table of text, its heading first."""
    named, known = table["options"]["metrics"], _known(table)
    names = [table["metric"]]
    for group in SHOWN if named is None else named:
        names += _of_group(group, known)
    variants = table["variants"]
    # dict.fromkeys: --metrics may name the tested one as well.
    rows = [[name, *(_figure(variant, name) for variant in variants.values())] for name in dict.fromkeys(names)]
    return [["figure", *variants], *rows]


def _known(table: Table) -> list[str]:
    """Return the names of all figures that some run has."""
    return list(dict.fromkeys(name for variant in table["variants"].values() for name in variant["metrics"]))


def _of_group(group: str, known: Sequence[str]) -> list[str]:
    """Return the figures of a group (calibration), or the one of this name."""
    # "calibration" is calibration.ece and calibration.brier, but not calibrations.
    return [name for name in known if f"{name}.".startswith(f"{group}.")]


def rows_by_seed(table: Table) -> list[list[str]]:
    """Return the metric of each run as a table of text: a row for each seed, a column for each variant."""
    variants, metric = table["variants"], table["metric"]
    found = [{run["seed"]: run["metrics"].get(metric) for run in variant["runs"]} for variant in variants.values()]
    spread = [variant["metrics"].get(metric, {}) for variant in variants.values()] + table["contrasts"]
    decimals = max(_decimals(one.get("sd") or 0) for one in spread)
    rows = [
        [str(seed), *(_or_dash(one.get(seed), "{:.{}f}", decimals) for one in found)]
        for seed in table["options"]["seeds"]
    ]
    return [["seed", *variants], *rows]


def latex(table: Table) -> str:
    """Return the figures of each variant as a LaTeX table of booktabs, a row for each; the notes are comments."""
    import pandas as pd

    variants = table["variants"]
    names = [name for name in dict.fromkeys([table["metric"], *SHOWN]) if name in _known(table)]
    cells = [[_figure(variant, name) for name in names] for variant in variants.values()]
    text = pd.DataFrame(cells, list(variants), names).to_latex(escape=True, column_format="l" + "r" * len(names))
    said = notes(table)
    comments = [f"% {note}\n" for note in said["runs"] + said["figures"]]
    return "".join(comments) + text.replace("±", r"$\pm$")  # escape=True leaves it


def _or_dash(value: Any, form: str, *decimals: int) -> str:
    return "-" if value is None else form.format(value, *decimals)


def _decimals(spread: float) -> int:
    """Return how many decimals show two digits of a spread, at least 4; 4 for one that is but rounding."""
    return max(4, _two_digits(spread)) if abs(spread) > EQUAL else 4


def _two_digits(spread: float) -> int:
    """Return after how many decimals a spread has two digits: 0.24 -> 2, -0.000031 -> 6."""
    return 1 - math.floor(math.log10(abs(spread)))


def _figure(variant: Mapping[str, Any], name: str) -> str:
    """Return mean ± sd, with the decimals of an sd of two digits, and the number of seeds if some lack the figure."""
    figures, runs = variant["metrics"].get(name), len(variant["runs"])
    if figures is None:
        return "-"
    mean, sd = figures["mean"], figures["sd"]
    some = f" ({figures['seeds']} of {runs} seeds)" if figures["seeds"] < runs else ""
    if sd is None or sd <= ROUNDING * abs(mean):
        return f"{short(mean, digits=5)}{'' if sd is None else ' ± 0'}{some}"
    decimals = max(_two_digits(sd), 0)
    return f"{mean:,.{decimals}f} ± {sd:,.{decimals}f}{some}"  # 0.50 ± 0.24
