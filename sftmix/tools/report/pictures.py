"""Figures of a run, each a plotly figure; None if the run has nothing to show there. The page sets the colours."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from sftmix.components.confidence import is_measured
from sftmix.data.dataset import instruction_and_response
from sftmix.measure.confounds import labelled
from sftmix.tools.report.axes import has_long_tail, log_axis, without_outliers
from sftmix.tools.report.run import RunView
from sftmix.types import Float64, Rows
from sftmix.words.shown import as_lines, short

GROUPS = ("#3f8fd2", "#e0603a", "#4fa64f", "#9a6fd0", "#b8860b", "#2a9d8f")
"""Colours of groups, labels and variants, the most confident group first; after the last, they start again."""
CORRECT = ["#d6503c", "#d9a63a", GROUPS[0]]
"""Colours of correctness from the least to the most, seen on light and dark paper alike."""

BINS = 40
"""Bins of the histogram of confidence."""
POINTS = 4000
"""Most points of the data map."""
ENDS = 400
"""Points of each end of the confidence that thinning keeps."""


def figure(x: str, y: str, **layout: Any) -> go.Figure:
    """Return an empty figure with titled axes and without plotly's template."""
    chart = go.Figure(layout={"template": go.layout.Template(), **layout})
    chart.update_layout(xaxis_title_text=x, yaxis_title_text=y)
    return chart.update_yaxes(automargin=True, title_standoff=10, exponentformat="none")  # -0.00005, not -50µ


# --------------------------------------------------------------------------------------------- curves


def losses(curves: Iterable[tuple[str, str, int, Any]], *keys: str) -> go.Figure | None:
    """Losses over the optimizer steps.

    curves  (name, colour, width, lines of metrics.jsonl): wide ones are pale, and seen below those that are drawn later
    keys    ntp and mixup, of every step, and eval_nll, of the held-out rows
    """
    chart = figure("optimizer step", "nats per token", height=380 if "ntp" in keys else None)
    for name, colour, width, lines in curves:
        for key in keys:
            # A loss over no tokens is written as 0, and left out.
            points = [line for line in lines if line.get(key) is not None and line.get(f"{key}_tokens", 1)]
            held_out = key == "eval_nll"
            if points:
                chart.add_scatter(
                    x=[line["step"] for line in points],
                    y=[line[key] for line in points],
                    name=escape(f"{name}, {'held out' if held_out else key}"),
                    mode="lines+markers" if held_out else "lines",
                    line={"color": colour, "width": width, "dash": "dot" if held_out else "solid"},
                    marker={"size": 4 + 3 * width, "symbol": "circle-open" if width > 1 else "circle"},
                    opacity=1 if width == 1 or held_out else 0.55,
                )
    return chart if chart.data else None


def held_out_gap(ours: Sequence[Any], theirs: Sequence[Any]) -> go.Figure | None:
    """Held-out NLL of one training minus another's, at the steps where both were measured; None without any."""
    first, second = (
        {line["step"]: line["eval_nll"] for line in lines if line.get("eval_nll") is not None}
        for lines in (ours, theirs)
    )
    steps = sorted(first.keys() & second.keys())
    if not steps:
        return None
    chart = figure("optimizer step", "nats per token")
    chart.add_scatter(x=steps, y=[first[step] - second[step] for step in steps], mode="lines+markers")
    chart.add_hline(0, line={"dash": "dash", "width": 1})
    return chart


# ------------------------------------------------------------------------------------------- confidence


def both_ends(by_confidence: Rows, size: int) -> Rows:
    """Return the `size` least and the `size` most confident rows; at most half of all, so that no row is in both.

    by_confidence  rows, least confident first
    """
    size = min(size, len(by_confidence) // 2)
    return np.concatenate([by_confidence[:size], by_confidence[len(by_confidence) - size :]])


def thinned(by_confidence: Rows) -> Rows:
    """Return at most POINTS of the rows, in file order: both ends, and evenly between."""
    if len(by_confidence) > POINTS:
        between = np.linspace(ENDS, len(by_confidence) - ENDS - 1, POINTS - 2 * ENDS).round().astype(np.int64)
        by_confidence = np.concatenate([both_ends(by_confidence, ENDS), by_confidence[between]])
    return np.sort(by_confidence)


def add_dots(chart: go.Figure, view: RunView, rows: Rows, **trace: Any) -> None:
    """Draw a dot for each of these rows; hovering over one shows the example, escaped, in short lines."""
    texts = []
    for row, example in zip(rows, view.rows.data.train.examples(rows), strict=True):
        instruction, response = instruction_and_response(example)
        parts = example.id, instruction, f"answer: {response}"
        # A hover is a few lines: 240 characters of each part, in lines of 70.
        lines = [textwrap.fill(textwrap.shorten(part, 240, placeholder=" ..."), 70) for part in parts]
        scores = f"confidence {short(view.scores.confidence[row])}, variability {view.scores.variability[row]:,.3g}"
        texts.append(escape(as_lines("\n".join([scores, *lines]))).replace("\n", "<br>"))
    chart.add_scatter(mode="markers", text=texts, hovertemplate="%{text}<extra></extra>", **trace)


def data_map(view: RunView, rows: Rows) -> go.Figure | None:
    """Variability against confidence of these rows, coloured by correctness (a data map, arXiv 2009.10795)."""
    if not len(rows):
        return None
    confidence, spread = view.scores.confidence[rows], view.scores.variability[rows]
    tail = has_long_tail(confidence)
    heights = np.minimum(-confidence, 1e300) if tail else confidence
    positive = spread[np.isfinite(spread) & (spread > 0)]
    log = len(positive) > 0  # with one checkpoint nothing varies
    if log:  # a variability of 0, or of inf, has no place on a logarithm
        spread = np.clip(spread, positive.min() / 2, 1e300)
    x, y = without_outliers(spread, log), without_outliers(heights, tail)
    correct = view.correctness
    chart = figure(
        "variability (log)" if log else "variability",
        "confidence" + (" (log)" if tail else ""),
        xaxis=log_axis(x) if log else {},
        yaxis=log_axis(y, "−") if tail else {},
        height=520,
        meta={"outside": int(((x != spread) & ~np.isnan(spread) | (y != heights)).sum())},  # the caption says it
    )
    add_dots(
        chart,
        view,
        rows,
        x=x,
        y=y,
        marker={
            "color": None if correct is None or np.isnan(correct[rows]).all() else correct[rows],
            "colorscale": CORRECT,
            "size": 5,
            "opacity": 0.75,
            "colorbar": {"title": "correct", "tickformat": ".0%", "thickness": 12},
        },
    )
    if view.split is not None:
        median = float(np.median(view.scores.confidence[view.by_confidence]))  # of all examples
        # A logarithmic axis is of minus the confidence.
        chart.add_hline(abs(median) if tail else median, line={"dash": "dash", "width": 1})
    return chart


def histograms(view: RunView) -> Iterator[go.Figure | None]:
    """Yield confidence by group and by frequent label (Figure 3), in bins that both have in common."""
    groups, split = {}, view.split
    if split is not None:
        for group, name in enumerate(split.names):
            values = view.scores.confidence[split.rows(group)]
            groups[name] = values[is_measured(values)]
    labels = labelled(view.scores)
    pooled = np.concatenate([*groups.values(), *labels.values(), np.empty(0)])  # np.empty(0): there may be neither
    for shown in (groups, labels):
        yield _histogram(shown, bins_of(pooled)) if shown and len(pooled) else None


def _histogram(shown: dict[str, Float64], bins: Float64) -> go.Figure:
    tail = has_long_tail(bins)
    edges = -bins if tail else bins
    axis = log_axis(edges, "−") if tail else {}
    chart = figure("confidence (log)" if tail else "confidence", "examples", xaxis=axis, barmode="overlay")
    for number, (name, values) in enumerate(shown.items()):
        chart.add_bar(
            x=(edges[1:] + edges[:-1]) / 2,
            width=np.abs(np.diff(edges)),
            y=np.histogram(values.clip(bins[0], bins[-1]), bins)[0].tolist(),  # beyond the edges: in the outer bins
            name=escape(name) or "(empty)",
            marker={"color": GROUPS[number % len(GROUPS)]},
            opacity=0.65,
        )
    return chart


def bins_of(values: Float64) -> Float64:
    """Return the BINS + 1 ascending edges of a histogram whose first and last bins also hold all values beyond.

    The bins are equally wide between the 0.5% and the 99.5% quantile; in log(-confidence) if they have a long tail.
    """
    low, high = np.quantile(values, [0.005, 0.995])
    width = BINS * np.spacing(max(abs(low), abs(high)))  # in less, some bins would have none
    if high - low <= width:
        low, high = low - max(width, 0.5), high + max(width, 0.5)
    elif has_long_tail(values):
        return -np.geomspace(-low, -high, BINS + 1)  # low is the larger in size: -144 to -1
    return np.histogram_bin_edges([low, high], BINS)


def hidden_map(view: RunView, rows: Rows, places: Float64) -> go.Figure:
    """The map of hidden states, both ends coloured (Figure 1).

    rows    i64[K], the less confident half first
    places  f64[N, 2], of all rows
    """
    bare = {"showticklabels": False, "zeroline": False}
    chart = figure("t-SNE 1", "t-SNE 2", xaxis=bare, yaxis=bare, height=440)
    # GROUPS[1::-1]: the most confident have the first colour, as in the histograms.
    for name, colour, part in zip(("least", "most"), GROUPS[1::-1], np.split(rows, 2), strict=True):
        x, y = places[part].T
        marker = {"color": colour, "size": 6, "opacity": 0.75}
        add_dots(chart, view, part, x=x, y=y, name=f"{len(part)} {name} confident", marker=marker)
    return chart


def tsne(hidden: np.ndarray) -> np.ndarray:
    """Return f32[K, 2], t-SNE (van der Maaten and Hinton, 2008) of f32[K, D].

    It starts from the first two principal components and has a fixed seed, so that a page can be made again.
    """
    if min(hidden.shape) > 50:
        hidden = PCA(50, random_state=0).fit_transform(hidden)  # as scikit-learn advises before t-SNE
    # 30 is scikit-learn's default, and has to be less than the number of points.
    model = TSNE(perplexity=min(30.0, (len(hidden) - 1) / 3), init="pca", random_state=0, n_jobs=1)
    return model.fit_transform(hidden)
