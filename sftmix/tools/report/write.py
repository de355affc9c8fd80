"""`write_report`: the page of one run, or of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sftmix.common.errors import ConfigError
from sftmix.common.figures import flatten, short
from sftmix.common.files import read_json
from sftmix.common.steps import read_steps
from sftmix.pipeline.directory import is_finished
from sftmix.tools.report import pictures
from sftmix.tools.report.examples import FILE, LOSSES, examples_table
from sftmix.tools.report.look import look
from sftmix.tools.report.mixed import mixed_pairs
from sftmix.tools.report.page import Plot, Section, write_page
from sftmix.tools.report.run import RunView, read_run, read_summary

PAGE = Path("report") / "report.html"
TABLE_ROWS = 150
"""Examples of each end in the table of the page."""
SUSPECTS = 50
"""Rows of `sftmix suspects` on the page."""
DOTS = "Lines: each step's batch. Dots: all held-out rows. Compare arms by NTP, which Mixup does not enter."

FIGURES = {
    "held-out NLL": "eval_nll_after",
    "best": "eval_nll_best",
    "token accuracy": "eval_accuracy",
    "exact match": "eval_exact_match",
    "ECE": "calibration.ece",
    "std of NLL": "confidence_std.log_after",
    "mu_effective": "mu_effective",
}
"""Columns of the table of arms -> figure of summary.json."""

GROUP = {"examples": "examples", "median confidence": "confidence_median", "response tokens": "response_tokens_mean"}
"""Columns of the table of groups -> figure of a group."""

Table = list[list[str]]


def write_report(runs: Sequence[Path], to: Path | None = None, *, map_size: int, score_all: bool = False) -> list[Path]:
    """Write the page, and of one run report/examples.parquet; return the files that were written.

    runs       finished runs
    to         the page; None: report/report.html in the only directory, or report.html
    map_size   examples on the map of hidden states of a single run, half from each end; 0: no model is loaded
    score_all  pass all training examples of a single run through its models, for the table
    Raises ConfigError where a directory is no finished run, and where `to` is a file that no report is.
    """
    to = to or (runs[0] / PAGE if len(runs) == 1 else Path("report.html"))
    if to.exists() and b'name="generator" content="sftmix' not in to.read_bytes()[:1000]:
        raise ConfigError(f"{to} exists and is no report of sftmix; name another file with --to")
    if len(runs) == 1:
        return _report_run(read_run(runs[0]), to, map_size, score_all=score_all)
    if score_all:
        raise ConfigError("--score is for the report of one run; give each run a report of its own first")
    summaries = {str(run): read_summary(run) for run in runs}
    steps = [
        (str(run), colour, read_steps(run / "train")) for run, colour in zip(runs, cycle(pictures.GROUPS), strict=False)
    ]
    plots = _plots(("losses", "NTP loss and held-out NLL", DOTS, pictures.losses(steps, "ntp", "eval_nll")))
    about = "Runs side by side. What is due to their seeds cannot be told from single runs; sftmix compare can."
    section = Section("runs", "Runs", tables=[_arms_table(summaries)], plots=plots)
    write_page(to, ", ".join(run.resolve().name for run in runs), about, [section])
    return [to]


# ---------------------------------------------------------------------------------------------- one run


def _report_run(view: RunView, to: Path, map_size: int, *, score_all: bool) -> list[Path]:
    import pyarrow.parquet as pq

    summary, config, data = view.summary, view.config, view.rows.data
    objective = type(config.objective).__name__
    trained = "train" in summary["stages"]
    drawn, places = (
        _hidden_states(view, map_size) if trained and map_size > 0 and len(view.by_confidence) else (None, {})
    )
    table = examples_table(view, scored=_score(view) if score_all else {}, places=places)
    (view.path / FILE).parent.mkdir(exist_ok=True)
    pq.write_table(table, view.path / FILE)
    ends = np.concatenate(pictures.both_ends(view.by_confidence, TABLE_ROWS))
    about = (
        f"{objective} on {summary['model']}, seed {summary['seed']}, learning rate {config.training.learning_rate:g}; "
        f"{len(data.train):,} training examples, {len(data.eval or ()):,} held out; sftmix {summary['version']}"
    )
    lines = list(sentences(summary))
    t_sne = "t-SNE of the trained model's hidden state at the last response token (the paper's Figure 1)."
    sections = [
        *suspects(view.path),
        Section("what-happened", "What happened", sentences=lines, tables=_tables(summary, objective)),
        Section("training", "Training", plots=_training(view)),
        Section("confidence", "Confidence", plots=_confidence(view)),
        Section(
            "examples",
            "Examples of both ends",
            f"The least and the most confident examples; all are in {FILE.as_posix()}. Click a heading to sort.",
            rows=table.take(ends).to_pylist(),
        ),
        Section("ends", "Hidden states", plots=_plots(("hidden-map", "Both ends", t_sne, drawn))),
        *([mixed_pairs(view)] if trained else []),
        *benchmarks(view.path),
        Section("rows", "Rows", pre="\n".join(data.report.lines())),
        Section("configuration", "Configuration", pre=config.yaml()),
    ]
    write_page(to, view.path.resolve().name, about, sections)
    return [to, view.path / FILE]


def sentences(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the page of a run says first: its remarks, and what length, mixing and one seed say."""
    yield from summary["remarks"]
    confounds = summary["confounds"]
    if confounds.get("auc_length_confident") is not None:
        yield (
            f"A confident response is longer than an unconfident one with a probability of "
            f"{confounds['auc_length_confident']:.0%} (50%: length says nothing). The splitters LengthMatched and "
            "RandomSplit are the controls."
        )
    if summary.get("mixup_tokens"):
        yield f"{confounds['mixed_token_share']:.0%} of the response tokens met a token of another example in Mixup."
    if "baseline" in summary:
        yield "Target and baseline are of one seed. Seeds often differ by more: sftmix compare trains several."


def _tables(summary: Mapping[str, Any], objective: str) -> list[Table]:
    """Return the table of base model, target and NTP baseline, and that of the groups of the split."""
    spread = (summary.get("confidence_std") or {}).get("log_before")
    base = {"eval_nll_after": summary.get("eval_nll_before"), "confidence_std": {"log_after": spread}}
    baseline = {"NTP baseline": summary["baseline"]} if "baseline" in summary else {}
    groups = [["group", *GROUP]]
    for name, group in summary.get("confidence", {}).items():
        groups.append([name, *("" if group.get(key) is None else short(group[key]) for key in GROUP.values())])
    tables = [_arms_table({"base model": base, objective: summary, **baseline})]
    return [*tables[: "train" in summary["stages"]], *([groups] if groups[1:] else [])]


def _arms_table(arms: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table, its head first, of what was measured of models: name -> its part of summary.json."""
    rows = [["", *FIGURES]]
    for name, arm in arms.items():
        figures = dict(flatten(arm))
        values = [figures.get(key, np.nan) for key in FIGURES.values()]
        rows.append([name, *("" if np.isnan(value) else f"{value:.4f}" for value in values)])
    return rows


def _model_of(view: RunView, stage: str) -> Path | None:
    """Return the model of a stage, base, train or baseline; None if the run did not export it."""
    if stage == "base":
        return Path(view.config.model.path)
    path = view.path / stage / "model"
    return path if path.is_dir() and is_finished(view.path / stage) else None


def _score(view: RunView) -> dict[str, np.ndarray]:
    """Return column of LOSSES -> f64[N], the mean NLL per response token of all training examples."""
    rows = np.arange(len(view.scores))
    return {
        column: look(view, model, rows, name=f"{stage}, all examples")
        for column, stage in LOSSES.items()
        if (model := _model_of(view, stage)) is not None
    }


def _hidden_states(view: RunView, map_size: int) -> tuple[go.Figure | None, dict[int, Sequence[float]]]:
    """Return the map of both ends, as the trained model sees them, and the place of each row on it."""
    trained = _model_of(view, "train")
    if trained is None:
        raise ConfigError(f"{view.path} has no train/model to look at; give --map 0 for a report without it")
    ends = np.concatenate(pictures.both_ends(view.by_confidence, map_size // 2))
    rows, back = np.unique(ends, return_inverse=True)
    places = pictures.tsne(look(view, trained, rows, name="trained model", hidden=True)[back])
    if places is None:
        return None, {}
    return pictures.hidden_map(view, ends, places), dict(zip(ends.tolist(), places.tolist(), strict=True))


def _plots(*plots: tuple[str, str, str, go.Figure | None]) -> list[Plot]:
    """Return the plots that have a figure."""
    return [Plot(name, title, caption, drawn) for name, title, caption, drawn in plots if drawn is not None]


def _training(view: RunView) -> list[Plot]:
    runs = [(*curve, read_steps(view.path / stage)) for stage, curve in pictures.CURVES.items()]
    return _plots(
        ("losses", "NTP loss and held-out NLL", DOTS, pictures.losses(runs, "ntp", "eval_nll")),
        ("mixup", "Mixup loss", "Of each step that mixed, per token pair.", pictures.losses(runs, "mixup")),
    )


def _confidence(view: RunView) -> list[Plot]:
    points = pictures.thinned(view.by_confidence)
    caption = (
        f"{len(points):,} of {len(view.scores):,} examples as the reference saw them; the dashed line is the median "
        "confidence. Hover shows instruction and response."
    )
    labels = "If the labels stand for quality, a confidence that knew of it keeps them apart (the paper's Figure 3)."
    return _plots(
        ("data-map", "Data map", caption, pictures.data_map(view, points)),
        ("histogram-groups", "Confidence by group", "Where the split cuts.", pictures.histogram(view, "groups")),
        ("histogram-labels", "Confidence by label", labels, pictures.histogram(view, "labels")),
    )


def suspects(run: Path) -> list[Section]:
    """Return the section of the first rows that `sftmix suspects` listed; none where it did not."""
    file = run / "suspects" / "suspects.parquet"
    if not file.exists():
        return []
    import pandas as pd

    first = pd.read_parquet(file).head(SUSPECTS)
    first["score"] = first["score"].map("{:.4f}".format)
    columns = ["rank", "source", "id", "signal", "score", "hard_tokens", "compared_with", "prompt", "response"]
    cells = first[columns].map(lambda value: f"{value:.300}" if isinstance(value, str) else str(value))
    about = "The rows that are most likely wrong; suspects/suspects.csv has all, and --data.exclude leaves some out."
    return [Section("suspects", "Rows to read first", about, tables=[[columns, *cells.values.tolist()]])]


def benchmarks(run: Path) -> list[Section]:
    """Return the section of the table that `sftmix evaluate` left in the run; none where nothing was evaluated."""
    file = run / "evaluation" / "table.json"
    if not file.exists():
        return []
    evaluated = read_json(file)
    return [Section("benchmarks", "Benchmarks", tables=[evaluated["table"]], sentences=evaluated["sentences"])]
