"""The report of one run: its table of examples, and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from sftmix.common.errors import ConfigError
from sftmix.pipeline.directory import is_finished
from sftmix.tools.report import curves, pictures
from sftmix.tools.report.benchmarks import benchmarks
from sftmix.tools.report.ends import TOPIC_ROWS, both_ends, topics, tsne
from sftmix.tools.report.examples import FILE, LOSSES, examples_table, scored_before, write_examples
from sftmix.tools.report.look import look
from sftmix.tools.report.page import Page, Plot, Section, write_page
from sftmix.tools.report.run import RunView, read_run
from sftmix.tools.report.sentences import sentences
from sftmix.tools.report.tokens import MixedPair, Response, Responses, all_rows, chosen_rows, planned_pairs
from sftmix.types import Float64, Rows

TABLE_ROWS = 150
"""Examples of each end in the table of the page."""


@dataclass(frozen=True)
class Seen:
    """What the models showed of some examples: both ends on a map, and responses and pairs token by token.

    ends    examples of each end
    rows    i64[K], the least confident ones first
    places  f64[K, 2], None for a run with too few examples
    """

    ends: int
    rows: Rows
    places: Float64 | None
    responses: Mapping[str, Sequence[Response]]
    pairs: Sequence[MixedPair]

    @property
    def by_row(self) -> dict[int, tuple[float, float]]:
        """Row -> place on the map."""
        if self.places is None:
            return {}
        return {row: (float(x), float(y)) for row, (x, y) in zip(self.rows.tolist(), self.places, strict=True)}


def report_run(path: Path, to: Path, *, map_size: int, score_all: bool) -> list[Path]:
    """Write the page of a finished run, and report/examples.parquet into the run; return both files.

    map_size   examples on the map of hidden states, half of them from each end; 0: no model is loaded
    score_all  pass all training examples through the base model and the trained ones, for the table
    """
    view = read_run(path)
    seen = see(view, map_size)
    scored = score_training_rows(view) if score_all else scored_before(path)
    table = examples_table(view, known=scored, places=seen.by_row if seen else {})
    write_examples(path / FILE, table)
    write_page(to, page_of(view, seen, table))
    return [to, path / FILE]


def model_of(view: RunView, stage: str) -> str | Path | None:
    """Return the model of a stage, base, train or baseline; None if the run did not export it."""
    if stage == "base":
        return view.config.model.path
    path = view.path / stage / "model"
    return path if path.is_dir() and is_finished(view.path / stage) else None


def score_training_rows(view: RunView) -> dict[str, dict[str, float]]:
    """Return column of LOSSES -> id -> mean NLL per response token, of all training examples."""
    rows, found = np.arange(len(view.scores), dtype=np.int64), {}
    for column, stage in LOSSES.items():
        model = model_of(view, stage)
        if model is not None:
            nll = look(view, model, rows, name=f"{stage}, all examples").nll.tolist()
            found[column] = dict(zip(view.scores.id, nll, strict=True))
    return found


def see(view: RunView, map_size: int) -> Seen | None:
    """Pass both ends through the trained model, and the examples shown token by token through the base model, too."""
    if not map_size:
        return None
    trained = model_of(view, "train")
    if trained is None:
        raise ConfigError(f"{view.path} has no train/model to look at; give --map 0 for a report without it")
    if not len(view.by_confidence):
        return None
    low, high = both_ends(view.by_confidence, map_size // 2)
    chosen, planned = chosen_rows(view), planned_pairs(view)
    shown, ends = all_rows(chosen, planned), np.concatenate([low, high])
    after = look(view, trained, np.union1d(ends, shown), name="trained model")
    before = look(view, view.config.model.path, np.sort(shown), name="base model")
    texts = Responses(view, before, after)
    responses = {name: [texts.of(row) for row in rows.tolist()] for name, rows in chosen.items()}
    return Seen(
        len(low),
        ends,
        tsne(after.last[np.searchsorted(after.rows, ends)]),
        responses,
        [texts.pair(pair) for pair in planned],
    )


# ---------------------------------------------------------------------------------------------- the page


def page_of(view: RunView, seen: Seen | None, table: pa.Table) -> Page:
    """Return the page of a run with its table of examples, all sections in order."""
    config, summary = view.config, view.summary
    return Page(
        title=view.path.resolve().name,
        about=(
            f"{view.objective} on {summary['model']}, seed {summary['seed']}, learning rate "
            f"{config.training.learning_rate:g}; sftmix {summary['version']} ({summary['git_revision'] or 'released'})"
        ),
        sentences=sentences(view),
        cards=list(_cards(view)),
        sections=[
            _training(view),
            _confidence(view),
            _examples(view, table),
            *([_ends(view, seen), _tokens(seen), _mixed(seen)] if seen else []),
            _outcome(view),
            *benchmarks(view.path),
            Section("rows", "Rows", pre=("What was read, dropped and cut", "\n".join(view.rows.data.report.lines()))),
            Section("configuration", "Configuration", pre=("config.yaml, for --config", view.config.yaml())),
        ],
    )


def _cards(view: RunView) -> list[tuple[str, str]]:
    summary = view.summary
    nll = {
        "held-out NLL, base model": summary.get("eval_nll_before"),
        f"held-out NLL, {view.objective}": summary.get("eval_nll_after"),
        "held-out NLL, NTP baseline": (summary.get("baseline") or {}).get("eval_nll_after"),
    }
    share = summary.get("confounds", {}).get("mixed_token_share")
    return [
        ("training examples", f"{len(view.scores):,}"),
        *((name, f"{value:.4f}") for name, value in nll.items() if value is not None),
        *([("response tokens mixed", f"{share:.0%}")] if share else []),
        *([("mu_effective", f"{summary['mu_effective']:.3f}")] if summary.get("mu_effective") else []),
    ]


def _plots(*plots: tuple[str, str, str, go.Figure | None], wide: bool = False, height: int = 340) -> list[Plot]:
    return [Plot(name, title, caption, made, wide, height) for name, title, caption, made in plots if made is not None]


def _training(view: RunView) -> Section:
    plots = _plots(
        (
            "losses",
            "NTP loss and held-out NLL",
            "Lines: each step's batch. Dots: all held-out rows. Compare arms by NTP, which Mixup does not enter.",
            curves.losses(view),
        ),
        (
            "difference",
            "Target minus NTP baseline",
            "Of the NTP loss of each step, whose rows both arms share, and of the held-out NLL; below 0 the target is "
            "lower.",
            curves.difference(view),
        ),
        ("mixup", "Mixup loss", "Beside NTP of the same steps; each over its own count.", curves.mixup(view)),
        (
            "mu",
            "How much Mixup weighs",
            "mu_effective is the mu that would give the same loss if both terms were divided by the NTP count.",
            curves.mu_effective(view),
        ),
        (
            "mixing",
            "What Mixup does to the training",
            "MeasureMixing: gradients by the input of the LM head, NTP beside Mixup (mu included).",
            curves.mixing(view),
        ),
        (
            "mixup-by-lambda",
            "Mixup loss by lambda",
            "Token pairs by the share of the larger of the two. Near 50% two tokens are asked for at once.",
            curves.mixup_by_lambda(view),
        ),
        ("rates", "Gradient norm and learning rate", "The norm is before clipping.", curves.rates(view)),
    )
    return Section("training", "Training", plots=plots)


def _confidence(view: RunView) -> Section:
    if not len(view.by_confidence):
        return Section("confidence", "Confidence")
    points = pictures.thinned(view)
    fewer = "" if len(points) == len(view.by_confidence) else _kept(len(points), len(view.by_confidence))
    steps = "" if view.dynamics is None else f" at steps {', '.join(map(str, view.dynamics.steps))}"
    wide = _plots(
        (
            "data-map",
            "Data map",
            f"An example as the reference saw it{steps}; the dashed line is the median confidence.{fewer} "
            "Hover shows instruction and response.",
            pictures.data_map(view, points),
        ),
        wide=True,
        height=520,
    )
    plots = _plots(
        (
            "histogram-groups",
            "Confidence by group",
            "Where the split cuts.",
            pictures.histogram(view, "groups"),
        ),
        (
            "histogram-labels",
            "Confidence by label",
            "If the labels stand for quality, a confidence that knew of it keeps them apart (the paper's Figure 3).",
            pictures.histogram(view, "labels"),
        ),
    )
    return Section("confidence", "Confidence", plots=[*wide, *plots])


def _kept(shown: int, there: int) -> str:
    """Say which points a scatter plot keeps of too many."""
    most = pictures.ENDS
    return (
        f" {shown:,} of {there:,} examples: {most} of each end, the {most} most variable, and every so-many-th between."
    )


def _examples(view: RunView, table: pa.Table) -> Section:
    low, high = both_ends(view.by_confidence, TABLE_ROWS)
    rows = table.take(np.concatenate([low, high])).to_pylist()
    text = (
        f"The {len(low)} least and the {len(high)} most confident examples, with their whole text. All examples are in "
        f"{FILE.as_posix()}. Click a heading to sort."
    )
    return Section("examples", "Examples of both ends", text, rows=rows)


def _ends(view: RunView, seen: Seen) -> Section:
    texts = [[view.texts[row][0] for row in rows] for rows in both_ends(view.by_confidence, TOPIC_ROWS)]
    found = (
        []
        if seen.places is None
        else _plots(
            (
                "hidden-map",
                "Hidden states of both ends",
                "t-SNE of the trained model's hidden state at the last response token (the paper's Figure 1). "
                "Distances between far clusters mean nothing.",
                pictures.hidden_map(view, seen.rows, seen.places, seen.ends),
            ),
            height=440,
        )
    )
    found += _plots(
        (
            "topics",
            "Topics of both ends",
            f"The most typical words of the instructions (TF-IDF, NMF), up to {TOPIC_ROWS:,} from each end.",
            pictures.topics(topics(*texts)),
        ),
        height=440,
    )
    return Section("ends", "What the two ends are made of", plots=found)


def _tokens(seen: Seen) -> Section:
    text = "Responses token by token. A dark token is one that the model did not expect."
    return Section("tokens", "Where a response is unsure", text, responses=seen.responses)


def _mixed(seen: Seen) -> Section:
    text = (
        "Pairs of the first step as the training mixed them: the n-th response token of one with the n-th of the "
        "other. The darker of the two has the larger share (lambda, and 1 - lambda). What is longer than its partner "
        "is grey and carries NTP alone."
    )
    return Section("mixed", "What is mixed with what", text, pairs=seen.pairs)


def _outcome(view: RunView) -> Section:
    plots = _plots(
        (
            "reliability",
            "Calibration",
            "Held-out tokens in 15 bins of equal size; below the diagonal the model is surer than it is right.",
            pictures.reliability(view),
        ),
        (
            "before-after",
            "Confidence before and after",
            "NLL per token of a sample of training examples; a narrower box is a more even confidence.",
            pictures.before_and_after(view),
        ),
    )
    return Section("outcome", "Before and after", plots=plots)
