"""Description of a split: confounds.json, histogram.json, and its groups.

Confounds are other causes that may be behind a split: length and labels. A high AUC or rank correlation says that the
two halves differ in the length of their responses, so a gain from mixing may come from length; RandomSplit and
LengthMatched are the controls.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.files import write_json
from sftmix.components.confidence import is_measured
from sftmix.measure.model import finite
from sftmix.types import UNPAIRED_NAME, Float64, Scores, Split

BINS = 40
"""Bins of the histogram of confidence."""
MAX_LABELS = 12
"""Largest number of labels that are reported, the most frequent ones."""


def describe_split(root: Path, scores: Scores, split: Split) -> tuple[list[str], dict[str, Any]]:
    """Write split/confounds.json and, if there is confidence, confidence/histogram.json under `root`.

    Return the files, relative to split/, and what the summary says about the groups: `confidence`, `confounds`, and
    `tied`, the share of the examples that have the confidence of one in another group.
    """
    measured = is_measured(scores.confidence)
    groups = {}
    figures = {}
    for group, name in enumerate(split.names):
        rows = split.rows(group)
        confidence = groups[name] = scores.confidence[rows[measured[rows]]]
        labels = Counter(str(scores.label[row]) for row in rows if scores.label)
        figures[name] = {
            "examples": len(rows),
            "confidence_mean": finite(np.mean, confidence),
            "confidence_std": finite(np.std, confidence),
            "confidence_median": finite(np.median, confidence),
            "response_tokens_mean": finite(np.mean, scores.n_tokens[rows]),
            "labels": {label: count / len(rows) for label, count in labels.items()},
        }
    figures[UNPAIRED_NAME] = {"examples": len(split.unpaired)}
    causes = confounds(scores, split)
    files = ["confounds.json"]
    panels = {"groups": groups}
    if by_label := labelled(scores):
        panels["labels"] = by_label
        causes["labels"] = {
            name: {"examples": len(v), "confidence_mean": float(v.mean()), "confidence_std": float(v.std())}
            for name, v in by_label.items()
        }
    write_json(root / "split" / "confounds.json", causes)
    if measured.any():
        write_json(root / "confidence" / "histogram.json", histogram(panels))
        files.append("../confidence/histogram.json")
    return files, {"confidence": figures, "confounds": causes, "tied": tied_at_the_cut(scores, split)}


def tied_at_the_cut(scores: Scores, split: Split) -> float:
    """Return the share of the examples that have the confidence of one in another group."""
    values_of_groups = np.unique(np.stack([scores.confidence, split.group]), axis=1)[0]
    values, n_groups = np.unique(values_of_groups, return_counts=True)
    return np.isin(scores.confidence, values[n_groups > 1]).mean().item()  # NaN equals nothing


def confounds(scores: Scores, split: Split) -> dict[str, Any]:
    """Return how far length is behind a split; None for what is undefined.

    spearman_confidence_length  Spearman's correlation of confidence with response length, over the examples with a
                                finite confidence; equal values share the mean of their ranks
    auc_length_confident        P(x > y) + P(x = y) / 2 for the lengths x of the first group, y of the last
                                (Mann-Whitney U / (n_x n_y))
    """
    from scipy.stats import mannwhitneyu, rankdata

    measured = is_measured(scores.confidence)
    correlation = None
    area = None
    if measured.sum() > 1:
        ranks = rankdata(np.stack([scores.confidence, scores.n_tokens], axis=1)[measured], axis=0)
        correlation = finite(lambda ranks: np.corrcoef(ranks, rowvar=False)[1, 0], ranks)
    first, last = scores.n_tokens[split.confident], scores.n_tokens[split.unconfident]
    if len(first) and len(last):
        area = float(mannwhitneyu(first, last, method="asymptotic").statistic) / (len(first) * len(last))
    return {"spearman_confidence_length": correlation, "auc_length_confident": area}


def histogram(panels: Mapping[str, Any]) -> dict[str, Any]:
    """Count every series of every panel in shared bins: {scale, edges, panels: {panel: {series: counts}}}.

    edges has BINS + 1 ascending numbers, every `counts` BINS. The bins are equally wide between the 0.5% and the 99.5%
    quantile, and the first and the last one also hold all values beyond.
    `scale` is "log" if all confidences are negative and the largest is ten times the smallest in size, as with
    perplexities: then the bins are equally wide in log(-confidence).
    """
    pooled = np.concatenate([v for series in panels.values() for v in series.values()])
    low, high = np.quantile(pooled, [0.005, 0.995])
    width = BINS * np.spacing(max(abs(low), abs(high)))  # in less, some bins would have none
    spread = high - low > width
    if not spread:
        low, high = low - max(width, 0.5), high + max(width, 0.5)
    logarithmic = bool(spread and pooled.max() < 0 and pooled.min() < 10 * pooled.max())
    edges = -np.geomspace(-low, -high, BINS + 1) if logarithmic else np.histogram_bin_edges([low, high], BINS)
    counts = {
        p: {s: np.histogram(v.clip(edges[0], edges[-1]), edges)[0].tolist() for s, v in series.items()}
        for p, series in panels.items()
    }
    return {"scale": "log" if logarithmic else "linear", "edges": edges.tolist(), "panels": counts}


def labelled(scores: Scores) -> dict[str, Float64]:
    """Return the finite confidences of the most frequent labels, most frequent first."""
    import pandas as pd

    table = pd.DataFrame({"label": scores.label, "confidence": scores.confidence})[is_measured(scores.confidence)]
    groups = table.groupby("label").confidence  # by name, without None
    frequent = groups.size().sort_values(ascending=False, kind="stable").index[:MAX_LABELS]
    return {name: groups.get_group(name).to_numpy() for name in frequent}
