"""`report`: the page of a run, of several, or of a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sftmix.cli.results import say
from sftmix.cli.words import read_words
from sftmix.common.errors import ConfigError
from sftmix.pipeline.finished import refuse_no_run

ABOUT = """Write one HTML page that shows what the method saw in the data and what came out; it needs no network.
Of one run it also writes report/examples.parquet: every example with its text, confidence, group and losses.

  sftmix report runs/first
  sftmix report runs/first --score          the loss of every training example before and after, in the table
  sftmix report runs/first runs/second --to both.html
  sftmix report runs/table5                 a directory of `sftmix compare`: differences with their intervals

It needs plotly and scikit-learn: pip install 'sftmix[report]'."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run directories, or one of `sftmix compare`")
    where = "the page [RUN/report/report.html; of several runs report.html]"
    parser.add_argument("--to", metavar="FILE", help=where)
    size = "examples on the map of hidden states of one run, half from each end; 0 loads no model [400]"
    parser.add_argument("--map", type=int, metavar="N", dest="map_size", help=size)
    score = "pass all training examples through the base model and the trained ones, for the table"
    parser.add_argument("--score", action="store_true", help=score)


def main(argv: Sequence[str]) -> None:
    """Write the page and say where it is."""
    given = read_words("report", ABOUT, add_options, argv)
    runs, to = [Path(run) for run in given.runs], None if given.to is None else Path(given.to)
    tables = [run for run in runs if (run / "table.json").exists()]
    if given.map_size is not None and (given.map_size < 0 or len(runs) > 1 or tables):
        raise ConfigError(f"--map is {given.map_size}; allowed: 0 (no model is loaded) and above, of one run alone")
    if to is not None and to.is_dir():
        raise ConfigError(f"--to {to} is a directory; name a file")
    say(f"report: {', '.join(map(str, runs))}")
    for run in runs:
        if run not in tables:
            refuse_no_run(run)  # before plotly is imported, and torch
    try:
        from sftmix.tools.report.write import write_report
    except ModuleNotFoundError as error:
        raise ConfigError(f"report needs {error.name}, which is not installed: pip install 'sftmix[report]'") from None
    for path in write_report(
        runs, to, map_size=400 if given.map_size is None else given.map_size, score_all=given.score
    ):
        print(path)
