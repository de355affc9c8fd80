"""`write_report`: the page of one run, of several, or of a table that `sftmix compare` made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json
from sftmix.tools.report.one import report_run
from sftmix.tools.report.page import Page, Plot, Section, write_page
from sftmix.tools.report.run import read_summary
from sftmix.tools.report.several import SideBySide, contrast_lines, curves_over_one_another, forest

PAGE = Path("report") / "report.html"


def write_report(runs: Sequence[Path], to: Path | None = None, *, map_size: int, score_all: bool = False) -> list[Path]:
    """Write the page; return the files that were written.

    runs       finished runs, or one directory of `sftmix compare`
    to         the page; None: report/report.html in the only directory, or report.html
    map_size   examples on the map of hidden states of a single run; 0: no model is loaded
    score_all  measure the loss of every training example of a single run
    Raises ConfigError where a directory is neither, and where `to` is a file that no report is.
    """
    alone = len(runs) == 1
    is_table = alone and (runs[0] / "table.json").exists()
    to = to or (runs[0] / PAGE if alone else Path("report.html"))
    _refuse_other_file(to)
    if alone and not is_table:
        return report_run(runs[0], to, map_size=map_size, score_all=score_all)
    if score_all:
        raise ConfigError("--score is for the report of one run; give each run a report of its own first")
    write_page(to, _page_of_table(runs[0]) if is_table else _page_of_runs(runs))
    return [to]


def _refuse_other_file(path: Path) -> None:
    """Raise ConfigError where the file exists and no report is."""
    if path.exists() and b'name="generator" content="sftmix' not in path.read_bytes()[:1000]:
        raise ConfigError(f"{path} exists and is no report of sftmix; name another file with --to")


def _page_of_table(out: Path) -> Page:
    table = read_json(out / "table.json")
    runs = []
    for variant, found in table["variants"].items():
        for run in found["runs"]:
            path = out / run["run"]
            if run["metrics"]:  # a run that diverged has none, and no summary
                runs.append(SideBySide(path, f"{variant}, seed {run['seed']}", variant, read_summary(path)))
    plot = forest(table)
    differences = Section(
        "differences",
        "Differences",
        "Runs of one seed are paired; the interval is over seeds, and over held-out examples where both were measured "
        f"on the same ones.{'' if table['complete'] else ' A verdict waits for the last run.'}",
        plots=[]
        if plot is None
        else [
            Plot(
                "forest",
                "Paired differences",
                f"In {table['metric']}; small dots are seeds.",
                plot,
                wide=True,
                height=int(plot.layout.height),
            )
        ],
    )
    done = f"{table['runs_done']} of {table['runs']} runs; {len(table['variants'])} variants, metric {table['metric']}"
    return Page(out.resolve().name, done, [differences, *_side_by_side(runs)], contrast_lines(table))


def _page_of_runs(paths: Sequence[Path]) -> Page:
    runs = [SideBySide(path, str(path), str(path), read_summary(path)) for path in paths]
    about = "Runs side by side. What is due to their seeds cannot be told from single runs; `sftmix compare` can."
    return Page(", ".join(run.path.resolve().name for run in runs), about, _side_by_side(runs))


def _side_by_side(runs: Sequence[SideBySide]) -> list[Section]:
    plots = []
    for key, title, caption in (
        ("eval_nll", "Held-out NLL", "Nats per response token."),
        ("ntp", "NTP loss", "Each step's batch, averaged in bins where the run is long."),
        ("mixup", "Mixup loss", "Of the steps that mixed."),
        ("grad_norm", "Gradient norm", "Before clipping."),
    ):
        made = curves_over_one_another(runs, key, title)
        if made is not None:
            plots.append(Plot(f"curves-{key}", title, caption, made))
    return [
        Section("curves", "Curves over one another", plots=plots),
        Section("figures", "Figures of every run", table=_table(runs)),
    ]


def _table(runs: Sequence[SideBySide]) -> list[list[str]]:
    columns = {
        "before": "eval_nll_before",
        "after": "eval_nll_after",
        "best": "eval_nll_best",
        "accuracy": "eval_accuracy",
        "mu_effective": "mu_effective",
    }
    lines = [["run", "seed", *columns]]
    figures = {run.name: [_cell(run.summary.get(key)) for key in columns.values()] for run in runs}
    return [*lines, *([run.name, str(run.summary["seed"]), *figures[run.name]] for run in runs)]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"
