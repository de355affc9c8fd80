"""What the page of a table shows: each contrast with its seeds, and the figures of table.md."""

from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from sftmix.disk.files import read_json
from sftmix.tools.compare.written import Table, contrast_rows, figure_rows, notes, rows_by_seed
from sftmix.tools.report.pictures import GROUPS, figure


def table_page(directory: Path, margin: float | None) -> dict[str, Any]:
    """Return what page.html shows of the table of a directory; margin: as in `contrasts`."""
    table = read_json(directory / "table.json", variants=dict, contrasts=list, options=dict, metric=str)
    return {
        "outcome": table,
        "plots": {"contrasts": contrasts(table, margin)},
        "notes": notes(table),
        "tables": {
            "Contrasts": contrast_rows(table) if table["contrasts"] else [],
            "Figures": figure_rows(table),
            "By seed": rows_by_seed(table),
        },
    }


def contrasts(table: Table, margin: float | None) -> go.Figure | None:
    """Draw a dot for the difference at each seed, and the mean with its 95% interval; None without any.

    margin  differences of at most this size are shaded: those that would not matter
    """
    drawn = [contrast for contrast in table["contrasts"] if contrast["differences"]]
    names = [escape(f"{contrast['ours']} − {contrast['theirs']}") for contrast in drawn]  # plotly takes HTML in names
    if not drawn:
        return None
    chart = figure(f"difference in {table['metric']}", "", height=140 + 70 * len(drawn))
    for name, contrast in zip(names, drawn, strict=True):
        dots = contrast["differences"]
        chart.add_scatter(
            x=dots,
            y=[name] * len(dots),
            mode="markers",
            marker={"color": GROUPS[0], "size": 7, "opacity": 0.6},
            text=[f"seed {seed}" for seed in contrast["seeds"]],
            showlegend=False,
        )
        low, high = contrast["interval"] or (contrast["mean"],) * 2  # None at one seed without examples: no bar
        reach = {"array": [high - contrast["mean"]], "arrayminus": [contrast["mean"] - low], "thickness": 2}
        chart.add_scatter(
            x=[contrast["mean"]],
            y=[name],
            mode="markers",
            marker={"color": GROUPS[1], "size": 11, "symbol": "diamond"},
            error_x={"type": "data", "symmetric": False, **reach},
            showlegend=False,
        )
    chart.update_yaxes(automargin=True, range=[len(drawn) - 0.5, -0.5])  # the first at the top
    chart.add_vline(0, line={"dash": "dash", "width": 1})
    if margin is not None:
        chart.add_vrect(-margin, margin, fillcolor=GROUPS[2], opacity=0.15, line_width=0)
    return chart
