"""Other causes that may stand behind a split: length and labels. Written with the split.

A high AUC or rank correlation says that the two halves differ in the length of their responses, so a gain from mixing
may come from length; RandomSplit and LengthMatched are the controls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.files import write_json
from sftmix.components.confidence import is_measured
from sftmix.types import Float64, Int64, Scores, Split

BINS = 40
"""Bins of the histogram of confidence."""
MAX_LABELS = 12
"""Largest number of labels that are reported, the most frequent ones."""
TIED = 0.01
"""Share of the examples above which ties at the cut get a remark."""


def write_confounds(root: Path, scores: Scores, split: Split) -> list[str]:
    """Write split/confounds.json and, if there is confidence, confidence/histogram.json under `root`.

    Return the files, relative to split/.
    """
    lengths, labels = scores.n_tokens, labelled(scores)
    confounds: dict[str, Any] = {
        "spearman_confidence_length": length_correlation(scores),
        "auc_length_confident": auc(lengths[split.confident], lengths[split.unconfident]),
    }
    if labels:
        confounds["labels"] = {
            name: {"examples": len(v), "confidence_mean": float(v.mean()), "confidence_std": float(v.std())}
            for name, v in labels.items()
        }
    write_json(root / "split" / "confounds.json", confounds)
    if not is_measured(scores.confidence).any():
        return ["confounds.json"]
    groups = {name: scores.confidence[split.rows(g)] for g, name in enumerate(split.names)}
    panels = {"groups": {name: values[is_measured(values)] for name, values in groups.items()}}
    if labels:
        panels["labels"] = labels
    write_json(root / "confidence" / "histogram.json", histogram(panels))
    return ["confounds.json", "../confidence/histogram.json"]


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


def ties_at_the_cut(scores: Scores, split: Split) -> Iterator[str]:
    """Yield a remark if more than the share TIED of the examples have the confidence of one in another group."""
    values_of_groups = np.unique(np.stack([scores.confidence, split.group]), axis=1)[0]
    values, n_groups = np.unique(values_of_groups, return_counts=True)
    tied = np.count_nonzero(np.isin(scores.confidence, values[n_groups > 1]))  # NaN equals nothing
    if tied > TIED * len(scores):
        yield (
            f"{tied:,} of {len(scores):,} examples ({tied / len(scores):.0%}) have the same confidence as one on the "
            "other side of the cut, so confidence does not divide them (Median and Quantile order them by id)."
        )


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
    values = defaultdict(list)
    for label, confidence in zip(scores.label or [], scores.confidence.tolist(), strict=False):
        if label is not None and is_measured(confidence):
            values[str(label)].append(confidence)
    frequent = sorted(values.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: np.asarray(of_label) for name, of_label in frequent[:MAX_LABELS]}
