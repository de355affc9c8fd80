"""`write_report`: the page of one run, or of several; page.html has its sections, with their titles and captions."""

from collections.abc import Sequence
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import plotly.offline
import pyarrow.parquet as pq

import sftmix
from sftmix.batches.collate import collate
from sftmix.batches.order import TrainingOrder
from sftmix.common.errors import ConfigError
from sftmix.common.files import placing, read_steps, write_text
from sftmix.common.places import is_there
from sftmix.common.shown import as_lines, short
from sftmix.components.component import Need
from sftmix.config.read import TABLE
from sftmix.data.dataset import text_of
from sftmix.pipeline.order import pairs_by
from sftmix.tools.evaluate.table import results_of
from sftmix.tools.report import pictures
from sftmix.tools.report.examples import FILE, LOSSES, examples_table
from sftmix.tools.report.run import RunView, look, read_run, read_summary
from sftmix.tools.report.table import table_page
from sftmix.tools.report.topics import topics

TABLE_ROWS = 150
"""Examples of each end in the table of the page."""
SUSPECTS = 50
"""Rows of `sftmix suspects` on the page."""
PAIRS, TOKENS = 3, 24
"""Pairs of the first step that are shown, and most tokens of a response there."""

CURVES = {
    "reference": ("reference", "#8a8f98"),
    "baseline": ("NTP baseline", "#e6930f"),
    "train": ("target", "#1b9e77"),
}
"""Stage with a training -> its name on the page, and its colour; the last one is drawn above the others."""


def write_report(
    runs: Sequence[Path],
    to: str | Path | None = None,
    *,
    map_size: int,
    score_all: bool = False,
    margin: float | None = None,
) -> list[Path]:
    """Write the page, and of one run report/examples.parquet; return the files that were written.

    The page is one HTML file that needs no network; all text in it is escaped.

    runs       finished runs, or the directory of one table
    to         the page; None: report/report.html in the only directory, or report.html
    map_size   examples on the map of hidden states of a single run, half from each end; 0: no model is loaded
    score_all  pass all training examples of a single run through its models, for the table
    margin     of a table: see `table.contrasts`
    Raises ConfigError if a directory is not a finished run, or if `to` is a file that is not a report.
    """
    to = Path(to or (runs[0] / "report" / "report.html" if len(runs) == 1 else "report.html"))
    if to.exists() and (to.is_dir() or b'name="generator" content="sftmix' not in to.read_bytes()[:1000]):
        raise ConfigError(f"{to} exists and is no report of sftmix; name another file with --to")
    files = [to]
    if len(runs) == 1 and is_there(runs[0] / TABLE):
        parts = table_page(runs[0], margin)
    elif len(runs) == 1:
        parts = _report_run(read_run(runs[0]), map_size, score_all=score_all)
        files.append(runs[0] / FILE)
    else:
        summaries = {str(run): read_summary(run, "train") for run in runs}
        curves = zip(summaries, cycle(pictures.GROUPS), [read_steps(run / "train") for run in runs], strict=False)
        parts = {"plots": {"losses": pictures.losses(curves, "ntp", "eval_nll")}, "runs": summaries}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        finalize=lambda value: as_lines(value) if type(value) is str else value,  # and not what is markup
        undefined=jinja2.ChainableUndefined,
    )
    environment.filters["figure"] = short
    html = environment.get_template("page.html").render(
        title=", ".join(run.resolve().name for run in runs),
        version=sftmix.__version__,
        plotly=plotly.offline.get_plotlyjs(),
        **parts,
    )
    write_text(to, html)
    return files


def _report_run(view: RunView, map_size: int, *, score_all: bool) -> dict[str, Any]:
    """Write report/examples.parquet of a run, and return what page.html shows of it.

    The page leaves out the sections of those that are empty or not given, and plots that are None.
    """
    summary, data = view.summary, view.rows.data
    every = np.arange(len(data.train))
    trained = "train" in summary["stages"]
    places = np.full((len(every), 2), np.nan)
    hidden_map = None
    ends = pictures.both_ends(view.by_confidence, max(map_size, 0) // 2)
    if trained and len(ends) >= 10:
        hidden = look(view, "train", ends, hidden=True)
        if hidden is None:
            raise ConfigError(f"{view.path} has no train/model to look at; give --map 0 for a report without it")
        places[ends] = pictures.tsne(hidden)
        hidden_map = pictures.hidden_map(view, ends, places)
    scored = {column: look(view, stage, every) for column, stage in LOSSES.items()} if score_all else {}
    table = examples_table(view, scored=scored, places=places)
    with placing(view.path / FILE) as staging:
        pq.write_table(table, staging)
    curves = [(*curve, read_steps(view.path / stage)) for stage, curve in CURVES.items()]
    listed = view.path / "suspects" / "suspects.parquet"
    points = pictures.thinned(view.by_confidence)
    outer = data.train.examples(pictures.both_ends(view.by_confidence, pictures.ENDS))
    return {
        "plots": {
            "losses": pictures.losses(curves, "ntp", "eval_nll"),
            "difference": pictures.held_out_gap(curves[2][2], curves[1][2]),
            "mixup": pictures.losses(curves, "mixup"),
            "data-map": pictures.data_map(view, points),
            **dict(zip(("histogram-groups", "histogram-labels"), pictures.histograms(view), strict=True)),
            "hidden-map": hidden_map,
        },
        "suspects": pd.read_parquet(listed).head(SUSPECTS).to_dict("records") if listed.exists() else [],
        "view": view,
        "shown": f"{len(points):,} of {len(every):,}",
        "examples": table.take(pictures.both_ends(view.by_confidence, TABLE_ROWS)).to_pylist(),
        "topics": topics([text_of(example)[0] for example in outer]),
        "pairs": mixed_pairs(view) if trained else [],
        "benchmarks": results_of(view.path),
    }


def mixed_pairs(view: RunView) -> list[list[tuple[str, ...]]]:
    """Return a table for each of the first pairs, as the training planned them; none if none can be known.

    So it is for a single run, whose first epoch mixes nothing, for objectives that see the losses of the batch, and for
    a user's own classes, which are not imported.
    """
    config, split, data = view.config, view.split, view.rows.data.train
    objective, reference = config.objective, config.reference
    needs = {*reference.needs, *objective.needs} & {Need.TARGET_LOSSES, Need.BATCH_NLL}
    parts = config.resolved_pairing(), objective, reference
    if split is None or needs or not all(type(part).__module__.startswith("sftmix.") for part in parts):
        return []
    tables = []
    divided = split, view.scores
    pairs = pairs_by(lambda epoch: divided, config.resolved_pairing(), config.seed)
    order = TrainingOrder(len(data), pairs, options=config.training, seed=config.seed)
    for pair in [unit for unit in order.batch(0) if len(unit) == 2][:PAIRS]:
        batch = collate([pair], data, split=split)
        plan = objective.plan(batch, step=0, total_steps=order.total_steps, seed=config.seed)
        columns = []
        for example in (data[slot.row] for slot in pair):
            predicted = example.input_ids[1:][example.target[1:]][:TOKENS]
            tokens = view.rows.encoder.tokenizer.batch_decode(predicted[:, None])
            columns.append([f"{split.labels[example.row]} {example.id}", *tokens])
        if len(plan.lam):
            columns.append(["lambda", *(f"{share:.2f}" for share in plan.lam[:TOKENS].tolist())])
            tables.append(list(zip_longest(*columns, fillvalue="")))
    return tables
