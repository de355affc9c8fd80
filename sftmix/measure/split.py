"""Other causes that may stand behind a split: length and labels. Written with the split.

A high AUC or rank correlation says that the two halves differ in the length of their responses, so a gain from mixing
may come from length; RandomSplit and LengthMatched are the controls.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.files import write_json
from sftmix.components.confidence import is_measured
from sftmix.measure.model import finite
from sftmix.types import UNPAIRED_NAME, Float64, Int64, Scores, Split

BINS = 40
"""Bins of the histogram of confidence."""
MAX_LABELS = 12
"""Largest number of labels that are reported, the most frequent ones."""


def describe_split(root: Path, scores: Scores, split: Split) -> tuple[list[str], dict[str, Any]]:
    """Write split/confounds.json and, if there is confidence, confidence/histogram.json under `root`.

    Return the files, relative to split/, and what the summary tells of the groups: `confidence`, `confounds`, and
    `tied`, the share of the examples that have the confidence of one in another group.
    """
    measured, labels = is_measured(scores.confidence), labelled(scores)
    groups, figures = dict[str, Float64](), dict[str, Any]()
    for group, name in enumerate(split.names):
        rows = split.rows(group)
        confidence = groups[name] = scores.confidence[rows[measured[rows]]]
        shares = Counter(scores.label[row] for row in rows) if scores.label is not None else {}
        figures[name] = {
            "examples": len(rows),
            "confidence_mean": finite(np.mean, confidence),
            "confidence_std": finite(np.std, confidence),
            "confidence_median": finite(np.median, confidence),
            "response_tokens_mean": finite(np.mean, scores.n_tokens[rows]),
            "labels": {str(label): count / len(rows) for label, count in shares.items()},
        }
    figures[UNPAIRED_NAME] = {"examples": len(split.unpaired)}
    confounds: dict[str, Any] = {
        "spearman_confidence_length": length_correlation(scores),
        "auc_length_confident": auc(scores.n_tokens[split.confident], scores.n_tokens[split.unconfident]),
    }
    files, panels = ["confounds.json"], {"groups": groups}
    if labels:
        panels["labels"] = labels
        confounds["labels"] = {
            name: {"examples": len(v), "confidence_mean": float(v.mean()), "confidence_std": float(v.std())}
            for name, v in labels.items()
        }
    write_json(root / "split" / "confounds.json", confounds)
    if measured.any():
        write_json(root / "confidence" / "histogram.json", histogram(panels))
        files.append("../confidence/histogram.json")
    return files, {"confidence": figures, "confounds": confounds, "tied": tied_at_the_cut(scores, split)}


def length_correlation(scores: Scores) -> float | None:
    """Return Spearman's correlation of confidence with response length, over the examples with a finite confidence.

    Equal values share the mean of their ranks. None if it is undefined.
    """
    from scipy.stats import spearmanr

    scored = is_measured(scores.confidence)
    confidence, length = scores.confidence[scored], scores.n_tokens[scored]
    if len(length) < 2 or np.ptp(confidence) == 0 or np.ptp(length) == 0:
        return None
    return float(spearmanr(confidence, length).statistic)


def auc(a: Int64, b: Int64) -> float | None:
    """Return P(x > y) + P(x = y) / 2 for x of `a`, y of `b` (Mann-Whitney U / (n_a n_b)); None if one is empty."""
    from scipy.stats import mannwhitneyu

    if not len(a) or not len(b):
        return None
    return float(mannwhitneyu(a, b, method="asymptotic").statistic) / (len(a) * len(b))


def tied_at_the_cut(scores: Scores, split: Split) -> float:
    """Return the share of the examples that have the confidence of one in another group."""
    values_of_groups = np.unique(np.stack([scores.confidence, split.group]), axis=1)[0]
    values, n_groups = np.unique(values_of_groups, return_counts=True)
    return np.isin(scores.confidence, values[n_groups > 1]).mean().item()  # NaN equals nothing


def histogram(panels: Mapping[str, Mapping[str, Float64]]) -> dict[str, Any]:
    """Count every series of every panel in shared bins: {scale, edges, panels: {panel: {series: counts}}}.

    edges has BINS + 1 ascending numbers, every `counts` BINS. The bins are equally wide between the 0.5% and the 99.5%
    quantile, and the first and the last one also hold all values beyond.
    `scale` is "log" if all confidences are negative and the largest is ten times the smallest in size, as with
    perplexities: then the bins are equally wide in log(-confidence).
    """
    pooled = np.concatenate([v for series in panels.values() for v in series.values()])
    low, high = np.quantile(pooled, [0.005, 0.995])
    logarithmic = bool(high > low and pooled.max() < 0 and pooled.min() < 10 * pooled.max())
    edges = -np.geomspace(-low, -high, BINS + 1) if logarithmic else np.histogram_bin_edges([low, high], BINS)
    counts = {
        p: {s: np.histogram(v.clip(edges[0], edges[-1]), edges)[0].tolist() for s, v in series.items()}
        for p, series in panels.items()
    }
    return {"scale": "log" if logarithmic else "linear", "edges": edges.tolist(), "panels": counts}


def labelled(scores: Scores) -> dict[str, Float64]:
    """Return the finite confidences of the most frequent labels, most frequent first."""
    if scores.label is None:
        return {}
    labels, measured = np.array(scores.label, dtype=object), is_measured(scores.confidence)
    counts = Counter(label for label in labels[measured] if label is not None)
    frequent = sorted(counts, key=lambda name: (-counts[name], name))
    return {name: scores.confidence[measured & (labels == name)] for name in frequent[:MAX_LABELS]}
