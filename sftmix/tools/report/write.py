"""`write_report`: the page of a run or of a table; page.html has its sections, with their titles and captions."""

from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import plotly.offline
import pyarrow.parquet as pq

import sftmix
from sftmix.data.dataset import instruction_and_response
from sftmix.disk.files import TABLE, placing, read_steps, write_text
from sftmix.disk.places import is_there
from sftmix.disk.regular import regular
from sftmix.tools.evaluate.table import results_of
from sftmix.tools.report import pictures
from sftmix.tools.report.examples import FILE, LOSSES, examples_table
from sftmix.tools.report.run import RunView, look, read_run
from sftmix.tools.report.table import table_page
from sftmix.tools.report.topics import topics
from sftmix.words.errors import ConfigError
from sftmix.words.shown import as_lines, short

TABLE_ROWS = 150
"""Examples of each end in the table of the page."""
SUSPECTS = 50
"""Rows of `sftmix suspects` on the page."""

CURVES = {
    "reference": ("reference", "#8a8f98", 1),
    "baseline": ("NTP baseline", "#e6930f", 4),
    "train": ("target", "#1b9e77", 1),
}
"""Stage with a training -> its name on the page, its colour and its width; the last one is drawn above the others."""


def write_report(
    run: Path,
    to: str | Path | None = None,
    *,
    map_size: int,
    score_all: bool = False,
    margin: float | None = None,
) -> list[Path]:
    """Write the page, and of a run the table of its examples beside it; return the files that were written.

    The page is one HTML file that needs no network; all text in it is escaped.

    run        a finished run, or the directory of a table
    to         the page; None: report/report.html in the directory
    map_size   examples on the map of hidden states of a run, half from each end; 0: no model is loaded
    score_all  pass all training examples of a run through its models, for the table
    margin     of a table: see `table.contrasts`
    Raises ConfigError if the directory is not a finished run, or if a file of yours would be replaced.
    """
    file = Path(to).with_suffix(".examples.parquet") if to else run / FILE
    is_table = is_there(run / TABLE)
    to = Path(to or run / "report" / "report.html")
    # Only a page of ours is written again.
    if to.exists() and (to.is_dir() or b'name="generator" content="sftmix' not in regular(to).read_bytes()[:1000]):
        raise ConfigError(f"{to} exists and is no report of sftmix; name another file with --to")
    if file.exists() and not (is_table or file == run / FILE or to.exists()):  # a table without its page is not ours
        raise ConfigError(f"{file} exists, and would be the table of the examples; name another page with --to")
    files = [to]
    if is_table:
        parts = table_page(run, margin)
    else:
        parts = _report_run(read_run(run), file, map_size, score_all=score_all)
        files.append(file)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        finalize=lambda value: as_lines(value) if type(value) is str else value,  # and not what is markup
        undefined=jinja2.ChainableUndefined,  # what a run has not made, as summary.baseline.eval_nll_after, is empty
    )
    environment.filters["figure"] = short
    html = environment.get_template("page.html").render(
        title=run.resolve().name,  # also of `.`
        version=sftmix.__version__,
        plotly=plotly.offline.get_plotlyjs(),
        **parts,
    )
    write_text(to, html)
    return files


def _report_run(view: RunView, file: Path, map_size: int, *, score_all: bool) -> dict[str, Any]:
    """Write the table of a run's examples to a file, and return what page.html shows of the run.

    The page leaves out the sections of those that are empty or not given, and plots that are None.
    """
    summary, data = view.summary, view.rows.data
    every = np.arange(len(data.train))
    trained = "train" in summary["stages"]
    places = np.full((len(every), 2), np.nan)
    hidden_map = None
    ends = pictures.both_ends(view.by_confidence, max(map_size, 0) // 2)  # no confidence: none
    if trained and len(ends) >= 10:  # t-SNE of fewer says nothing
        hidden = look(view, "train", ends, hidden=True)
        if hidden is None:
            raise ConfigError(f"{view.path} has no train/model to look at; give --map 0 for a report without it")
        places[ends] = pictures.tsne(hidden)
        hidden_map = pictures.hidden_map(view, ends, places)
    scored = {column: look(view, stage, every) for column, stage in LOSSES.items()} if score_all else {}
    table = examples_table(view, scored=scored, places=places)
    with placing(file) as staging:
        pq.write_table(table, staging)
    curves = [(*curve, read_steps(view.path / stage)) for stage, curve in CURVES.items()]
    listed = view.path / "suspects" / "suspects.parquet"
    points = pictures.thinned(view.by_confidence)
    outer = data.train.examples(pictures.both_ends(view.by_confidence, pictures.ENDS))
    return {
        "plots": {
            "losses": pictures.losses(curves, "ntp", "eval_nll"),
            "difference": pictures.held_out_gap(curves[2][-1], curves[1][-1]),  # target, baseline
            "mixup": pictures.losses(curves, "mixup"),
            "data-map": pictures.data_map(view, points),
            **dict(zip(("histogram-groups", "histogram-labels"), pictures.histograms(view), strict=True)),
            "hidden-map": hidden_map,
        },
        "suspects": pd.read_parquet(regular(listed)).head(SUSPECTS).to_dict("records") if listed.exists() else [],
        "view": view,
        "file": file.name,
        "shown": f"{len(points):,} of {len(every):,}",
        "examples": table.take(pictures.both_ends(view.by_confidence, TABLE_ROWS)).to_pylist(),
        "topics": topics([instruction_and_response(example)[0] for example in outer]),
        "benchmarks": results_of(view.path),
    }
